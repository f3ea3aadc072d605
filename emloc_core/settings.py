"""The settings of every stage, in one place: command line, recipe and Python API read the same models.

Imports nothing heavy; the command line builds its options from these fields.
"""

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from emloc_core.errors import did_you_mean


class Settings(BaseModel):
    """Frozen settings; an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class CutSettings(Settings):
    """How large an emulator is, and where."""

    ratio: float = Field(0.6, gt=0, lt=1, description="Share of the compressed Linears' parameters that is kept.")
    allocator: str = Field(
        "uniform",
        description="How ranks are allocated: 'uniform', the same ratio everywhere, as in the paper; 'global', more "
        "where an error disturbs the block more, within the same number of parameters. Plugins bring more.",
    )


class CompressSettings(CutSettings):
    """How an emulator is made."""

    samples: int = Field(64, ge=1, description="Calibration rows.")
    selection: int = Field(32, ge=0, description="Rows held out for choosing the correction's clamp.")
    max_length: int | None = Field(None, ge=1, description="Use that many tokens of a row; all by default.")
    seed: int = Field(0, description="Of the draw of rows.")
    calibration: Literal["base", "propagated"] = Field(
        "base",
        description="On the base's own activations, as in the paper, or 'propagated': on what the emulator so far "
        "gives each Linear, which makes up for the error before it.",
    )
    factorizer: str = Field("activation-svd", description="How Linears are factorised; plugins bring more.")


#: Passes over the rows where neither steps nor epochs are given.
DEFAULT_EPOCHS = 3.0
#: Settings of training that change how much memory it needs.
MEMORY_SETTINGS = ("batch_size", "accumulation", "gradient_checkpointing", "bf16", "lora_rank", "target_modules")


class StepSettings(Settings):
    """How optimiser steps are taken, on whatever is trained."""

    steps: int | None = Field(None, ge=1, description="Optimiser steps; instead of epochs.")
    learning_rate: float = Field(2e-4, gt=0, description="The highest learning rate of the schedule.")
    batch_size: int = Field(8, ge=1, description="Rows per device in one forward pass.")
    accumulation: int = Field(1, ge=1, description="Forward passes per optimiser step.")
    max_length: int | None = Field(None, ge=1, description="Tokens after which a row is cut; none is cut by default.")
    bf16: bool = Field(True, description="Compute in bfloat16 where that is safe (automatic mixed precision).")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the LoRA's initial values and of the order of rows.")
    report_to: str = Field("none", description="Where the trainer reports to, besides log.json: tensorboard, say.")
    save_steps: int = Field(50, ge=1, description="Steps between the checkpoints that an interrupted run resumes at.")
    logging_steps: int = Field(10, ge=1, description="Steps between entries of log.json.")
    extra: dict[str, Any] = Field(default_factory=dict, description="Any other fields of TRL's SFTConfig.")


class TrainSettings(StepSettings):
    """How the LoRA is trained."""

    epochs: float | None = Field(None, gt=0, description="Passes over the rows; 3 where no steps are given either.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations, to save memory.")
    lora_rank: int = Field(8, ge=1, description="Rank of the LoRA.")
    lora_alpha: float = Field(16.0, gt=0, description="The LoRA is scaled by alpha / rank.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the LoRA's input.")
    target_modules: list[str] | None = Field(None, description="Last parts of module paths; by default the family's.")

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSettings":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class PolishSettings(StepSettings):
    """How exact steps are taken from an adapter, whose rank, scale and targets they keep."""

    steps: int = Field(20, ge=1, description="Optimiser steps.")
    save_steps: int = Field(5, ge=1, description="Steps between the checkpoints that an interrupted run resumes at.")
    logging_steps: int = Field(5, ge=1, description="Steps between entries of log.json.")


class ExactSettings(Settings):
    """What exact steps may use; none of it changes their result."""

    memory: str | None = Field(
        None,
        description="What the device may use, such as 24GiB: weights stay there as far as they fit beside what a step "
        "needs; by default every block is read twice per step.",
    )
    park: Literal["memory", "disk"] = Field(
        "memory", description="Where activations at block boundaries wait for the backward."
    )


class CorrectSettings(Settings):
    """How a LoRA is carried over to the base."""

    clamp: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto", "none"] = Field(
        "auto",
        description="Limit of the correction: a number (3 in the paper), 'none', or 'auto': compare a few values, "
        "uncorrected among them, by loss on rows held out for it.",
    )
    method: str = Field("emloc", description="The correction; plugins bring more.")


#: How pydantic's names of a union's members begin.
_MEMBERS = ("literal[", "constrained-", "float", "function-", "bool")


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return all of a validation's problems in one line, with the name that was probably meant."""
    texts = []
    for problem in error.errors():
        # Which member of a union was tried is pydantic's business, not the user's.
        steps = [str(step) for step in problem["loc"] if not str(step).startswith(_MEMBERS)]
        where = ".".join(steps) or "settings"
        if problem["type"] == "extra_forbidden":
            known = list(_section(model, steps[:-1]).model_fields)
            text = f"there is no setting {where!r}.{did_you_mean(steps[-1], known)}".removesuffix(".")
        elif problem["type"] == "missing":
            text = f"{where} is missing"
        elif problem["type"] == "value_error":  # of several settings together: they are all of the input
            text = (f"{where}: " if steps else "") + problem["msg"].removeprefix("Value error, ")
        else:
            text = f"{where} = {problem['input']!r}: {problem['msg']}"
        if text not in texts:
            texts.append(text)
    return "; ".join(texts) + "."


def _section(model: type[BaseModel], steps: list[str]) -> type[BaseModel]:
    remaining = iter(steps)
    for step in remaining:
        annotation: Any = model.model_fields[step].annotation
        if get_origin(annotation) in (dict, list):
            next(remaining, None)  # the key or the index, of which any may be
        options = [option for option in (annotation, *get_args(annotation)) if isinstance(option, type)]
        model = next(option for option in options if issubclass(option, BaseModel))
    return model
