"""Converts the settings of stage 2 to TRL's and PEFT's configs."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_core.compat.transformers import recomputing_field, use_one_gpu
from emloc_core.compat.trl import has_tiles
from emloc_core.errors import EmlocError, did_you_mean, first_line
from emloc_core.settings import ALL_LINEAR, DEFAULT_EPOCHS, StepSettings, TrainSettings

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import TrainingArguments

#: Fields of SFTConfig, by the setting that stands for each.
_NAMED = {
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    **{name: name for name in ("learning_rate", "max_length", "bf16", "seed", "report_to", "save_steps",
                               "logging_steps", "eval_steps")},
}  # fmt: skip
#: Fields of SFTConfig that this stage sets itself, and why.
_FIXED = {
    **dict.fromkeys(("output_dir", "save_total_limit"), "-o names the output"),
    **dict.fromkeys(("fsdp", "fsdp_config"), "one process writes the adapter, so all of it has to be there"),
    "push_to_hub": "`emloc push` uploads the finished directory, and so does --push",
    **dict.fromkeys(
        ("save_strategy", "save_only_model", "resume_from_checkpoint", "load_best_model_at_end", "logging_strategy"),
        "an interrupted run resumes by itself",
    ),
    **dict.fromkeys(
        ("assistant_only_loss", "chat_template_path", "dataset_kwargs", "dataset_text_field", "eos_token", "pad_token",
         "truncation_mode"),
        "rows are tokenized the same way for calibration and training",
    ),
    **dict.fromkeys(
        ("eval_strategy", "do_eval", "eval_on_start", "metric_for_best_model", "greater_is_better"),
        "--eval-data names rows to evaluate",
    ),
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), "the model is loaded before the trainer is made"),
}  # fmt: skip
#: Fields of DPOConfig that ORPO, which has a single loss and no reference, does not read.
_OF_DPO = {
    "loss_type", "loss_weights", "label_smoothing", "ld_alpha", "discopop_tau", "f_divergence_type",
    "f_alpha_divergence_coef", "use_weighting", "precompute_ref_log_probs", "precompute_ref_batch_size",
    "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "use_liger_kernel",
}  # fmt: skip


def check_extra(settings: StepSettings) -> None:
    """Refuse ``extra`` fields that are unknown or cannot be set."""
    kind = _config_class(settings)
    settings_by_field = {field: setting for setting, field in _NAMED.items()}
    for field in ("activation_checkpointing", "gradient_checkpointing"):  # the field's newer and older name
        settings_by_field[field] = "gradient_checkpointing"
    if settings.learns_preferences:
        settings_by_field["beta"] = "beta"
    field_names = [field.name for field in dataclasses.fields(kind)]
    for name in settings.extra:
        if name in settings_by_field:
            raise EmlocError(
                f"{name} is not an extra field: it is a setting of its own.",
                f"Give {settings_by_field[name]} directly; `emloc train --help` names its option.",
            )
        if name in _FIXED:
            raise EmlocError(f"{name} cannot be set: {_FIXED[name]}.", "Leave it out.")
        if getattr(settings, "objective", "") == "orpo" and name in _OF_DPO:
            raise EmlocError(f"ORPO has no {name}.", "Leave it out, or use the objective dpo.")
        if name not in field_names:
            message = f"{kind.__name__} has no field {name!r}.{did_you_mean(name, field_names)}"
            raise EmlocError(message, f"See TRL's {kind.__name__}.")


def require_tracker(settings: StepSettings) -> None:
    """Refuse a tracker that is not known or not installed, which a trainer does only when it has its model."""
    if settings.report_to == "none":
        return
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for tracker in get_reporting_integration_callbacks(settings.report_to):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        message = f"The tracker {settings.report_to!r} cannot be used: {first_line(error)}"
        raise EmlocError(message, "Install it, or choose another.", code="unavailable") from error


def _config_class(settings: StepSettings) -> Any:
    """Return TRL's class of configs for an objective."""
    from trl import DPOConfig, KTOConfig, SFTConfig

    return {"dpo": DPOConfig, "kto": KTOConfig, "orpo": DPOConfig}.get(getattr(settings, "objective", ""), SFTConfig)


def trainer_config(
    settings: StepSettings,
    checkpoints: Path,
    *,
    completion_only: bool,
    use_cpu: bool,
    kind: "type[TrainingArguments] | None" = None,
    **fixed: Any,
) -> "TrainingArguments":
    """Return TRL's config.

    Args:
        checkpoints: directory for the trainer's own checkpoints.
        completion_only: whether only completions enter the loss, unless it is one of preferences; ``extra`` may
            override it.
        use_cpu: whether there is no accelerator; ``extra`` may override it.
        kind: another class than TRL's own.
        **fixed: fields that the stage sets itself.

    Raises:
        ValueError: from TRL or transformers: settings conflict with each other or with the machine.
    """
    own: dict[str, Any] = {"completion_only_loss": completion_only}
    if settings.learns_preferences:
        own = {"beta": dict(settings)["beta"]}
    elif not (settings.extra.get("packing") or settings.extra.get("shuffle_dataset")):
        own["dataset_kwargs"] = {"skip_prepare_dataset": True}  # the rows are tokenized and have labels
    if not settings.learns_preferences and not has_tiles():
        own["loss_type"] = "nll"  # of whole logits, as plans count them; chunks would read packed rows as a matrix
    config: TrainingArguments = (kind or _config_class(settings))(
        **{**trainer_fields(settings, checkpoints), **own, "use_cpu": use_cpu, **settings.extra, **fixed}
    )
    use_one_gpu(config)  # several are for `accelerate launch`
    return config


def trainer_fields(settings: StepSettings, checkpoints: Path) -> dict[str, Any]:
    """Return the settings as fields of a trainer's config, with every trainer's fields for checkpoints."""
    values = dict(settings)
    fields = {field: values[setting] for setting, field in _NAMED.items() if setting in values}
    if "gradient_checkpointing" in values:
        fields[recomputing_field()] = values["gradient_checkpointing"]
    fields["max_steps"] = settings.steps or -1
    fields["num_train_epochs"] = values.get("epochs") or DEFAULT_EPOCHS
    return {"output_dir": str(checkpoints), "save_strategy": "steps", "save_total_limit": 2, **fields}


def lora_config(
    settings: TrainSettings, target_modules: list[str], task: str | None = "CAUSAL_LM", model: Any = None
) -> "LoraConfig":
    """Return PEFT's config.

    Args:
        target_modules: ends of module paths.
        task: PEFT's name of the task.
        model: the model with the experts, if a LoRA on experts is asked for.

    Raises:
        EmlocError: the model has no experts.
    """
    from peft import LoraConfig

    experts = _on_experts(settings, model) if settings.lora_experts else {}
    alpha = settings.lora_alpha  # some readers of PEFT's config expect an integer if it can be one
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]  # PEFT only divides it
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        target_modules=list(target_modules),
        **{"rank_pattern": settings.rank_pattern or {}, **experts},
        layers_to_transform=settings.layers_to_transform,
        modules_to_save=settings.modules_to_save,
        trainable_token_indices=settings.trainable_token_indices,
        task_type=task,
    )


def _on_experts(settings: TrainSettings, model: Any) -> dict[str, Any]:
    """Return a config's fields for LoRAs on experts: their stacks and rank, with the scale of the other LoRAs."""
    from emloc_core.standins.expert_loras import expert_stacks
    from emloc_core.standins.experts import expert_rank

    stacks = expert_stacks(model)
    rank = expert_rank(settings.lora_rank, model.config)
    share = rank / settings.lora_rank
    alpha = settings.lora_alpha * (share**0.5 if settings.use_rslora else share)
    ends = {".".join(path.split(".")[-2:]) for path in stacks}
    return {
        "target_parameters": stacks,
        "rank_pattern": {**dict.fromkeys(sorted(ends), rank), **(settings.rank_pattern or {})},
        "alpha_pattern": dict.fromkeys(sorted(ends), alpha),
    }


#: Fields of PEFT's config that PEFT or the stage sets.
_NOT_OF_LORA = {"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version"}


def lora_settings(config: "LoraConfig") -> dict[str, Any]:
    """Return a config of PEFT as settings of :class:`~emloc_core.settings.TrainSettings`.

    Raises:
        EmlocError: it asks for something that is no setting.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise EmlocError(f"peft_config is a {type(config).__name__}.", "Give a LoraConfig.")
    usual, settings = LoraConfig(), {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = "lora_rank" if field.name == "r" else field.name
        if name in TrainSettings.model_fields:
            settings[name] = sorted(value) if isinstance(value, set) else value
        elif field.name not in _NOT_OF_LORA and value != getattr(usual, field.name):
            raise EmlocError(
                f"peft_config has {field.name} = {value!r}, which is not a setting of `train`.", "Leave it out."
            )
    targets = settings["target_modules"]
    if isinstance(targets, str) and targets != ALL_LINEAR:
        raise EmlocError(f"target_modules = {targets!r} is a pattern.", "Give a list of modules, or all-linear.")
    return settings
