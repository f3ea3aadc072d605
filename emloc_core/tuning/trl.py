"""How a LoRA is trained: the settings of stage 2, and what they become for TRL and PEFT.

Light to import: recipes and the command line read settings without torch.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from emloc_core.errors import EmlocError, did_you_mean
from emloc_core.settings import Settings

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import SFTConfig

DEFAULT_EPOCHS = 3.0

#: Command line options that are not just the setting's name.
FLAGS = {
    "learning_rate": "--lr",
    "lora_rank": "--rank",
    "lora_alpha": "--alpha",
    "use_rslora": "--rslora",
    "lora_dropout": "--dropout",
    "target_modules": "--target",
    "extra": "--set",
}

#: Settings that change what tuning needs, as ``emloc plan`` takes them; and those that are named otherwise there.
COUNTED = ("batch_size", "accumulation", "gradient_checkpointing", "bf16", "lora_rank", "target_modules")
COUNTED_FLAGS = {**FLAGS, "lora_rank": "--lora-rank"}

#: Fields of SFTConfig that settings stand for, by the setting's name.
_NAMED = {
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "learning_rate": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "max_length": "max_length",
    "gradient_checkpointing": "activation_checkpointing",
    "bf16": "bf16",
    "seed": "seed",
    "report_to": "report_to",
    "save_steps": "save_steps",
    "logging_steps": "logging_steps",
}
#: Fields of SFTConfig that this stage decides, each with its reason.
_FIXED = {
    **dict.fromkeys(("output_dir", "push_to_hub", "save_total_limit"), "the output is published whole"),
    **dict.fromkeys(
        ("save_strategy", "save_only_model", "resume_from_checkpoint", "load_best_model_at_end", "logging_strategy"),
        "an interrupted run goes on by itself",
    ),
    **dict.fromkeys(
        ("assistant_only_loss", "chat_template_path", "dataset_kwargs", "dataset_text_field", "eos_token", "pad_token",
         "truncation_mode"),
        "rows are tokenized in one way, for calibration and for training",
    ),
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), "the model is loaded before the trainer is made"),
}  # fmt: skip


class TrainSettings(Settings):
    """How the LoRA is trained."""

    steps: int | None = Field(None, ge=1, description="Optimiser steps; instead of epochs.")
    epochs: float | None = Field(None, gt=0, description="Passes over the rows; 3 where no steps are given either.")
    learning_rate: float = Field(2e-4, gt=0, description="The highest learning rate of the schedule.")
    batch_size: int = Field(8, ge=1, description="Rows a device in one forward pass.")
    accumulation: int = Field(1, ge=1, description="Forward passes an optimiser step.")
    max_length: int | None = Field(None, ge=1, description="Tokens after which a row is cut; none is cut by default.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations, to save memory.")
    bf16: bool = Field(True, description="Compute in bfloat16 where that is safe (automatic mixed precision).")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the LoRA's initial values and of the order of rows.")
    report_to: str = Field("none", description="Where the trainer reports to, besides log.json: tensorboard, say.")
    save_steps: int = Field(50, ge=1, description="Steps between the checkpoints that an interrupted run goes on from.")
    logging_steps: int = Field(10, ge=1, description="Steps between entries of log.json.")
    lora_rank: int = Field(8, ge=1, description="Rank of the LoRA.")
    lora_alpha: float = Field(16.0, gt=0, description="The LoRA is scaled by alpha / rank.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the LoRA's input.")
    target_modules: list[str] | None = Field(None, description="Last parts of module paths; by default the family's.")
    extra: dict[str, Any] = Field(default_factory=dict, description="Any other fields of TRL's SFTConfig.")

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSettings":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self

    def check_extra(self) -> None:
        """Refuse ``extra`` fields that are unknown, or that are not the user's to set.

        Raises:
            EmlocError: names the field and what to do instead.
        """
        from trl import SFTConfig

        named = {field: setting for setting, field in _NAMED.items()}
        named["gradient_checkpointing"] = "gradient_checkpointing"  # the old name of the field
        known = [field.name for field in dataclasses.fields(SFTConfig)]
        for name in self.extra:
            if name in named:
                raise EmlocError(f"{name} has a setting of its own.", f"Set {named[name]} instead.")
            if name in _FIXED:
                raise EmlocError(f"{name} cannot be set: {_FIXED[name]}.", "Leave it out.")
            if name not in known:
                raise EmlocError(f"SFTConfig has no field {name!r}.{did_you_mean(name, known)}", "See TRL's SFTConfig.")

    def sft_config(self, checkpoints: Path, *, completion_only: bool, use_cpu: bool) -> "SFTConfig":
        """Return TRL's config.

        Args:
            checkpoints: directory of the trainer's own checkpoints.
            completion_only: whether the loss falls on completions alone; ``extra`` may say otherwise.
            use_cpu: whether there is no accelerator; ``extra`` may say otherwise.

        Raises:
            ValueError: from TRL or transformers, where settings contradict each other or the machine.
        """
        from trl import SFTConfig

        named = {field: getattr(self, setting) for setting, field in _NAMED.items()}
        named["max_steps"] = self.steps or -1
        named["num_train_epochs"] = self.epochs or DEFAULT_EPOCHS
        config = SFTConfig(
            output_dir=str(checkpoints),
            save_strategy="steps",
            save_total_limit=2,
            **{"completion_only_loss": completion_only, "use_cpu": use_cpu, **named, **self.extra},
        )
        if config.n_gpu > 1:  # several GPUs are for `accelerate launch`: nn.DataParallel would change the batch
            config._n_gpu = 1
        return config

    def lora_config(self, target_modules: list[str]) -> "LoraConfig":
        """Return PEFT's config, with these last parts of module paths as its targets."""
        from peft import LoraConfig

        alpha = self.lora_alpha  # some readers of PEFT's config expect a whole number where it can be one
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]  # PEFT only divides it
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            target_modules=list(target_modules),
            task_type="CAUSAL_LM",
        )
