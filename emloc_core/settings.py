"""The settings of every stage, in one place: command line, recipe and Python API read the same models.

Imports nothing heavy; the command line builds its options from these fields.
"""

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
