"""The settings of every stage, shared by the command line, recipes and the Python API.

Imports nothing heavy; the command line builds its options from these fields.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

#: Instead of a kind of emulator: the one that is recommended for the memory.
AUTO = "auto"
#: Instead of a memory: the free memory of the device that this machine tunes on.
FREE = "free"
#: The paper's kind, whose size is only a ratio; and the kind that is recommended without a memory.
FACTORS, FOUR_BITS = "low-rank", "nf4"
#: How the paper makes an emulator, and how far it lets a correction go.
PAPER, PAPER_CLAMP = {"kind": FACTORS, "calibration": "base", "allocator": "uniform"}, 3.0
#: How ranks are distributed among the Linears.
Allocator = Literal["uniform", "global"]
#: Which answers of a conversation count in the loss.
Loss = Literal["last", "all"]
_LOSS: Any = Field(
    "last", description="Which answers of a conversation count towards the loss: the 'last' one, or 'all'."
)


#: A split of a dataset by name, or a share of it: a number, or a number as text.
SplitOrShare = Annotated[
    str,
    BeforeValidator(
        lambda value: str(value) if isinstance(value, float) else value, json_schema_input_type=str | float
    ),
]


def parse_pairs(value: Any) -> Any:
    """Parse ``name=value,name=value``; return anything but text unchanged.

    Raises:
        ValueError: it is not a list of pairs.
    """
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
    if not all(name.strip() and equals and target.strip() for name, equals, target in pairs):
        raise ValueError("write pairs, as in name=value,name=value")
    return {name.strip(): target.strip() for name, _, target in pairs}


#: The user's names of columns, by the usual names; or both as text, as on the command line.
Columns = Annotated[dict[str, str], BeforeValidator(parse_pairs, json_schema_input_type=str | dict[str, str])]


def _numbers(value: Any) -> Any:
    """Parse ``0-3,7``."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    numbers: list[int] = []
    for part in (part.strip() for text in texts for part in text.split(",") if part.strip()):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) - int(first) >= _MOST_NUMBERS:
            raise ValueError("write numbers and ranges, as in 0-3,7")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


_MOST_NUMBERS = 1 << 20
#: Numbers in a list, or ranges of them as text, as on the command line.
Numbers = Annotated[
    list[Annotated[int, Field(ge=0)]], BeforeValidator(_numbers, json_schema_input_type=str | list[int])
]
#: Ranks by module; or both as text.
Ranks = Annotated[
    dict[str, Annotated[int, Field(ge=1)]], BeforeValidator(parse_pairs, json_schema_input_type=str | dict[str, int])
]


class Settings(BaseModel):
    """Frozen settings. An unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


#: Least number of calibration rows of every kind, unless the user says otherwise.
SAMPLES = 64


class CompressSettings(Settings):
    """How an emulator is made."""

    ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Fraction of the compressed Linears' parameters to keep, for kinds with factors; 0.6 by default.",
    )
    allocator: Allocator | None = Field(
        None,
        description="How ranks are distributed among the Linears: 'uniform', the same ratio everywhere; 'global', "
        "higher ranks where errors disturb a block more, for factors alone.",
    )
    kind: str = Field(
        AUTO,
        description="Kind of emulator: 'nf4' (four bits), 'trellis' (under three bits), 'low-rank-nf4' (factors in "
        "four bits), 'low-rank-2-bit' (factors in two bits) or 'low-rank'. 'auto' is the best kind for the tuning "
        "memory if that is given; otherwise 'nf4', or 'low-rank' if a ratio or an allocator is given.",
    )
    paper: bool = Field(
        False,
        description="Follow the paper, for reference: kind low-rank, uniform ranks, activations of the base, clamp 3.",
    )
    samples: int | None = Field(
        None,
        ge=1,
        description="Number of calibration rows; by default 64 (for some kinds up to 256), or a third of the rows if "
        "that is fewer.",
    )
    selection: int = Field(
        32,
        ge=0,
        description="Number of rows to hold out for the correction; by default 32, or a sixth of the rows if that is "
        "fewer.",
    )
    max_length: int | None = Field(None, ge=1, description="Maximum tokens per row; unlimited by default.")
    loss: Loss = _LOSS
    seed: int = Field(0, description="Seed for drawing rows.")
    calibration: Literal["none", "base", "propagated"] | None = Field(
        None,
        description="Activations to fit the Linears to: by default 'propagated', those of the emulator built so far; "
        "'base', those of the base, which is faster; 'none' (nf4 only), which rounds without them, in seconds.",
    )
    keep: Literal["head"] | None = Field(
        None,
        description="'head' keeps the output layer and the token embeddings as they are in the base; by default they "
        "are packed if the Linears are.",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_the_paper(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("paper"):
            return values
        if conflicting := [name for name, value in PAPER.items() if values.get(name) not in (None, AUTO, value)]:
            raise ValueError(
                f"the paper's way has {conflicting[0]} = {PAPER[conflicting[0]]!r}; leave out {conflicting[0]} or paper"
            )
        return values | PAPER

    def settled(self) -> Self:
        """Return the settings with a definite kind, for when no memory chooses it."""
        if self.kind != AUTO:
            return self
        factors = self.ratio is not None or self.allocator is not None
        return self.model_copy(update={"kind": FACTORS if factors else FOUR_BITS})

    def for_tuning(self, tuning: "TrainSettings") -> Self:
        """Return the settings for an emulator that is tuned like this: modules that are trained in full stay dense."""
        return self.model_copy(update={"keep": "head"}) if tuning.trains_modules else self


#: The target for every Linear but the output layer, as in PEFT.
ALL_LINEAR = "all-linear"
#: Epochs when neither steps nor epochs are given.
DEFAULT_EPOCHS = 3.0
#: Training settings that change how much memory training needs.
MEMORY_SETTINGS = (
    "objective", "batch_size", "accumulation", "gradient_checkpointing", "bf16", "lora_rank", "lora_experts",
    "target_modules", "rank_pattern", "layers_to_transform", "modules_to_save", "trainable_token_indices",
)  # fmt: skip


#: As in TRL's example of DPO with a LoRA.
_PREFERENCE_RATE = 5e-6
#: Models narrower than those that were measured get no higher rate.
_HIGHEST_RATE = 1e-2


class StepSettings(Settings):
    """How optimiser steps are taken, whatever is trained."""

    steps: int | None = Field(None, ge=1, description="Optimiser steps, instead of epochs.")
    learning_rate: float | None
    batch_size: int = Field(8, ge=1, description="Rows per device in one forward pass.")
    accumulation: int = Field(1, ge=1, description="Gradient accumulation: forward passes per optimiser step.")
    max_length: int | None = Field(None, ge=1, description="Maximum tokens per row; unlimited by default.")
    loss: Loss = _LOSS
    bf16: bool = Field(True, description="Compute in bfloat16 where that is safe (automatic mixed precision).")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed for the LoRA's initial values and the order of rows.")
    report_to: str = Field("none", description="Tracker to log to, besides log.json, such as tensorboard.")
    save_steps: int = Field(50, ge=1, description="Steps between checkpoints, from which an interrupted run resumes.")
    logging_steps: int = Field(10, ge=1, description="Steps between entries in log.json.")
    eval_steps: int = Field(50, ge=1, description="With rows to evaluate: steps between evaluations, each with a "
                            "checkpoint; the best checkpoint is kept.")  # fmt: skip
    patience: int | None = Field(None, ge=1, description="With rows to evaluate: stop after this many evaluations "
                                 "without a lower loss; by default, never.")  # fmt: skip
    extra: dict[str, Any] = Field(default_factory=dict, description="Other fields of TRL's SFTConfig; with the "
                                  "objective dpo or orpo, of its DPOConfig; with kto, of its KTOConfig.")  # fmt: skip

    @property
    def learns_preferences(self) -> bool:
        """Whether training learns to prefer chosen answers to rejected ones."""
        return False

    @property
    def learns_labels(self) -> bool:
        """Whether training learns from single answers, each with a label: wanted or not."""
        return False

    @property
    def trains_modules(self) -> bool:
        """Whether embeddings or the output layer are trained in full."""
        return False

    @property
    def can_be_exact(self) -> bool:
        """Whether exact steps could train the same: they support only the likelihood of answers, and only LoRAs."""
        return not (self.learns_preferences or self.trains_modules)

    def with_rate(self, width: int) -> Self:
        """Return settings with a learning rate, for a model whose hidden states have this width."""
        return self if self.learning_rate else self.model_copy(update={"learning_rate": self._default_rate(width)})

    def _default_rate(self, width: int) -> float:
        """Return the peak learning rate where none is set.

        To learn answers it is 1 / width, to one digit: the best of those measured at widths of 128 and 576, and what
        QLoRA (Dettmers et al., 2023, arXiv 2305.14314) used at 4,096, 5,120 and 8,192.
        """
        return _PREFERENCE_RATE if self.learns_preferences else float(f"{min(_HIGHEST_RATE, 1 / width):.0e}")


class TrainSettings(StepSettings):
    """How the LoRA is trained."""

    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate; by default 1 / width of the model, such as 2e-3 at 576 and 2e-4 at 4096, or "
        "5e-6 where preferences are learned.",
    )
    objective: Literal["sft", "dpo", "kto", "orpo"] = Field(
        "sft",
        description="Training objective: 'sft' learns the answers; 'dpo' learns to prefer each row's chosen answer to "
        "its rejected one; 'kto' learns from single answers, each labelled as wanted or not; 'orpo' learns the chosen "
        "answers and to prefer them, without a reference model.",
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="With dpo and kto: how strongly deviating from the model without the LoRA is penalised. With "
        "orpo: weight of the preference relative to the likelihood.",
    )
    epochs: float | None = Field(None, gt=0, description="Passes over the rows; 3 by default, unless steps are given.")
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass, to save memory."
    )
    lora_rank: int = Field(8, ge=1, description="Rank of the LoRA.")
    lora_alpha: float = Field(16.0, gt=0, description="LoRA alpha: the LoRA is scaled by alpha / rank.")
    use_rslora: bool = Field(False, description="Scale the LoRA by alpha / sqrt(rank) instead (rsLoRA).")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the LoRA's input.")
    target_modules: list[str] | None = Field(
        None,
        description="Modules to put the LoRA on, by the end of their paths, or all-linear for every Linear but the "
        "output layer. By default, the family decides.",
    )
    lora_experts: bool = Field(
        False,
        description="Also put a LoRA on every expert, with the rank divided by the number of experts per token. This "
        "takes memory for all experts.",
    )
    rank_pattern: Ranks | None = Field(
        None,
        description=(
            "Different ranks for some modules, by the end of their paths, such as q_proj=16,layers.0.mlp.down_proj=4."
        ),
    )
    layers_to_transform: Numbers | None = Field(
        None, description="Layers whose modules get a LoRA, such as 0-7,15; by default all."
    )
    modules_to_save: list[str] | None = Field(
        None, description="Modules to train in full, the token embeddings or the output layer, by the end of their "
            "paths, such as embed_tokens,lm_head."
    )  # fmt: skip
    trainable_token_indices: Numbers | None = Field(
        None, description="Ids of tokens whose embeddings are trained, such as 32000-32003; with tied embeddings, "
        "their rows of the output layer too."
    )  # fmt: skip

    @property
    def trains_modules(self) -> bool:
        """Whether embeddings or the output layer are trained in full."""
        return bool(self.modules_to_save or self.trainable_token_indices)

    @property
    def learns_preferences(self) -> bool:
        """Whether training learns to prefer answers to others, rather than to give them."""
        return self.objective != "sft"

    @property
    def learns_labels(self) -> bool:
        """Whether training learns from single answers, each with a label, as KTO does."""
        return self.objective == "kto"

    @field_validator("target_modules", "modules_to_save", mode="before", json_schema_input_type=str | list[str] | None)
    @classmethod
    def _between_commas(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            return value
        names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
        if ALL_LINEAR in names and len(set(names)) > 1:
            raise ValueError(f"{ALL_LINEAR} cannot be combined with other targets")
        return names

    @model_validator(mode="after")
    def _plain_on_experts(self) -> "TrainSettings":
        if self.lora_experts and (self.lora_dropout or self.layers_to_transform):
            raise ValueError(
                "a LoRA on experts supports neither lora_dropout nor layers_to_transform; leave these out, or "
                "lora_experts"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSettings":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class PolishSettings(StepSettings):
    """How exact steps continue from an adapter, whose rank, scale and targets they keep."""

    steps: int = Field(20, ge=1, description="Optimiser steps.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate; by default half of the rate that the adapter was tuned at or, where that is "
        "not known, an eighth of train's default.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed for the order of rows.")
    save_steps: int = Field(5, ge=1, description="Steps between checkpoints, from which an interrupted run resumes.")
    logging_steps: int = Field(5, ge=1, description="Steps between entries in log.json.")
    eval_steps: int = Field(5, ge=1, description="With rows to evaluate: steps between evaluations, each with a "
                            "checkpoint; the best checkpoint is kept.")  # fmt: skip

    def _default_rate(self, width: int) -> float:
        """Return an eighth of tuning's, which does least harm to an adapter without moments (docs/polish.md)."""
        return super()._default_rate(width) / 8


class ExactSettings(Settings):
    """What exact steps may use; these settings do not change the result."""

    memory: str | None = Field(
        None,
        description="Memory to use on the device, such as 24GiB: weights that fit beside a step stay there. By "
        "default, every block is read twice per step.",
    )
    park: Literal["memory", "disk"] = Field(
        "memory",
        description="Where activations at block boundaries are kept until the backward pass: in 'memory' or on 'disk'.",
    )


class CorrectSettings(Settings):
    """How a LoRA is transferred to the base."""

    clamp: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto", "none"] = Field(
        "auto",
        description="Limit of the correction: a number (3 in the paper), 'none', or 'auto', which compares several "
        "limits, and several scales of the uncorrected LoRA, on held-out rows.",
    )
    correction: str = Field(
        "emloc", description="How the LoRA is corrected: 'emloc', as in the paper. Plugins can add others."
    )


class ExportSettings(Settings):
    """What a server gets."""

    gguf: bool = Field(False, description="Write GGUF, for llama.cpp and tools built on it.")
    comfyui: bool = Field(
        False, description="Write an adapter with the tensor names that ComfyUI and kohya's scripts read."
    )
    dtype: Literal["f32", "f16", "bf16", "q8_0"] = Field(
        "f16",
        description="With gguf: type of the matrices, f32, f16, bf16 or q8_0. Vectors are always f32; LoRAs are f32 "
        "instead of q8_0.",
    )
