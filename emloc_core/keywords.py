"""The settings as keywords, for editors and type checkers: written by `make docs` from the settings."""

from typing import Any, Literal, TypedDict


class CompressKwargs(TypedDict, total=False):
    """Of :class:`CompressSettings`."""

    ratio: float | None
    allocator: Literal["uniform", "global"] | None
    kind: str
    paper: bool
    samples: int | None
    selection: int
    max_length: int | None
    loss: Literal["last", "all"]
    seed: int
    calibration: Literal["none", "base", "propagated"] | None
    keep: Literal["head"] | None


class TrainKwargs(TypedDict, total=False):
    """Of :class:`TrainSettings`."""

    steps: int | None
    learning_rate: float | None
    batch_size: int
    accumulation: int
    max_length: int | None
    loss: Literal["last", "all"]
    bf16: bool
    seed: int
    report_to: str
    save_steps: int
    logging_steps: int
    eval_steps: int
    patience: int | None
    extra: dict[str, Any]
    objective: Literal["sft", "dpo", "kto", "orpo"]
    beta: float
    epochs: float | None
    gradient_checkpointing: bool
    lora_rank: int
    lora_alpha: float
    use_rslora: bool
    lora_dropout: float
    target_modules: str | list[str] | None
    lora_experts: bool
    rank_pattern: str | dict[str, int] | None
    layers_to_transform: str | list[int] | None
    modules_to_save: str | list[str] | None
    trainable_token_indices: str | list[int] | None


class PolishKwargs(TypedDict, total=False):
    """Of :class:`PolishSettings`."""

    steps: int
    learning_rate: float | None
    batch_size: int
    accumulation: int
    max_length: int | None
    loss: Literal["last", "all"]
    bf16: bool
    seed: int
    report_to: str
    save_steps: int
    logging_steps: int
    eval_steps: int
    patience: int | None
    extra: dict[str, Any]


class ExactKwargs(TypedDict, total=False):
    """Of :class:`ExactSettings`."""

    memory: str | None
    park: Literal["memory", "disk"]


class EvalRowsKwargs(TypedDict, total=False):
    """Of :class:`EvalRows`."""

    data: Any
    split: str | float | None
    on_base: bool
    base: str | None


class CorrectKwargs(TypedDict, total=False):
    """Of :class:`CorrectSettings`."""

    clamp: float | Literal["auto", "none"]
    correction: str


class ExportKwargs(TypedDict, total=False):
    """Of :class:`ExportSettings`."""

    gguf: bool
    comfyui: bool
    dtype: Literal["f32", "f16", "bf16", "q8_0"]


class ModelKwargs(TypedDict, total=False):
    """Of :class:`ModelSection`."""

    base: str
    memory: str | None
    headroom: str | None


class DataKwargs(TypedDict, total=False):
    """Of :class:`DataSection`."""

    train: str | list[str] | dict[str, float]
    split: str
    columns: str | dict[str, str]
    skip_bad_rows: bool
    calibration: str | None
    eval: str | None
    eval_split: str | float | None
    eval_base: bool
    test: list[str]


class AnswersKwargs(TypedDict, total=False):
    """Of :class:`AnswersSection`."""

    rows: str
    max_new_tokens: int
    guidance: float | None


class EvalKwargs(TypedDict, total=False):
    """Of :class:`EvalSection`."""

    tasks: list[str]
    systems: list[str] | None
    limit: int | None
    batch_size: int
    full_lora: bool


class RecipeKwargs(TypedDict, total=False):
    """Of :class:`Recipe`."""

    output: str
    way: Literal["emulator", "lora", "exact"] | None
    model: ModelKwargs
    data: DataKwargs
    compress: CompressKwargs
    train: TrainKwargs
    rounds: int
    correct: CorrectKwargs
    polish: PolishKwargs | None
    merge: bool
    answers: AnswersKwargs | None
    eval: EvalKwargs | None
    push: str | None


class PlanKwargs(TypedDict, total=False):
    """Of :class:`TrainSettings`."""

    objective: Literal["sft", "dpo", "kto", "orpo"]
    batch_size: int
    accumulation: int
    gradient_checkpointing: bool
    bf16: bool
    lora_rank: int
    lora_experts: bool
    target_modules: str | list[str] | None
    rank_pattern: str | dict[str, int] | None
    layers_to_transform: str | list[int] | None
    modules_to_save: str | list[str] | None
    trainable_token_indices: str | list[int] | None


class EvaluateKwargs(TypedDict, total=False):
    """Of :class:`EvaluateRequest`."""

    limit: int | None
    batch_size: int
    chat: bool | None
    seed: int
