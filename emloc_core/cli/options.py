"""Command line options from a settings class: one per field, with the field's default and description."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import rich_click as click
from click.core import ParameterSource
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from emloc_core.data.mixture import parse_sources
from emloc_core.errors import EmlocError
from emloc_core.requests import COLUMNS, SKIP
from emloc_core.settings import parse_pairs

#: Second option names for training settings.
TRAIN_FLAGS = {
    "learning_rate": "--lr",
    "lora_rank": "--rank",
    "lora_alpha": "--alpha",
    "use_rslora": "--rslora",
    "lora_dropout": "--dropout",
    "target_modules": "--target",
    "extra": "--set",
}

_ROWS = (
    "Rows of your task: a JSONL, JSON, CSV or Parquet file, a saved dataset, or a hub dataset. Repeatable; a weight of "
    "2 takes every row twice, 0.5 takes half of the rows."
)

device = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Device to run on: cpu, cuda, cuda:1, xpu, or auto (the GPU if there is one).",
)

headroom = click.option(
    "--headroom",
    metavar="SIZE",
    help="With --memory: how much of it to keep free, such as 2GiB, 8% or 0.  [default: 5%, at most 1GiB]",
)


def output(help: str) -> Callable[..., Any]:
    """Return the option for the output's directory."""
    return click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help=help)


def _all(*added: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator that adds all of these options, in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(added):
            function = option(function)
        return function

    return decorate


def _columns(_context: Any, _option: Any, text: str) -> dict[str, str]:
    try:
        columns: dict[str, str] = parse_pairs(text)
    except ValueError as error:
        raise EmlocError(f"--columns {text}: {error}.", "Give the usual name of each column first.") from None
    return columns


#: How the rows are read.
split = _all(
    click.option("--split", default="train", show_default=True, help="Split of a saved or hub dataset."),
    click.option("--columns", default="", metavar="NAME=COLUMN,...", show_default=False, callback=_columns,
                 help=COLUMNS),
)  # fmt: skip


def data(*, required: bool = False, help: str = _ROWS) -> Callable[..., Any]:
    """Return the option for the rows: one source by name, or several with their weights."""
    return click.option(
        "--data",
        required=required,
        multiple=True,
        metavar="SOURCE[:WEIGHT]",
        callback=lambda _context, _option, texts: parse_sources(texts) if texts else None,
        help=help,
    )


def evaluation(*, of_emulator: bool) -> Callable[..., Any]:
    """Return a decorator that adds the options for rows to evaluate; :func:`evaluated` takes their values.

    Args:
        of_emulator: whether the base may be evaluated as well.
    """
    added = [
        click.option("--eval-data", metavar="SOURCE", help="Rows to evaluate every --eval-steps steps. They are not "
                     "trained on, and the best checkpoint is kept."),
        click.option("--eval-split", metavar="SPLIT", help="Split of the rows to evaluate, or the share of --data to "
                     "hold out, such as 0.05."),
    ]  # fmt: skip
    if of_emulator:
        added += [
            click.option("--eval-base", "eval_on_base", is_flag=True, help="Also evaluate the base with the LoRA, read "
                         "block by block, and keep the checkpoint that is best there."),
            click.option("--base", "eval_base", metavar="MODEL", help="With --eval-base: the base.  [default: the "
                         "model that the emulator names]"),
        ]  # fmt: skip
    return _all(*added)


def evaluated(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a command's values into those of :func:`evaluation`, by the fields of :class:`EvalRows`, and the rest."""
    names = [name for name in values if name.startswith("eval_")]
    selected = {name.removeprefix("eval_"): values[name] for name in names if values[name] is not None}
    return selected, {name: value for name, value in values.items() if name not in names}


skip = click.option("--skip-bad-rows", is_flag=True, help=SKIP)


#: The rows to train on, and other fields of SFTConfig.
rows = _all(
    data(required=True),
    split,
    skip,
    click.option("--exclude", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
                 help="File with rows not to train on, such as test rows; repeatable."),
    click.option("--set", "extra", multiple=True, metavar="KEY=VALUE",
                 help="Another field of TRL's SFTConfig; with the objective dpo or orpo, of its DPOConfig; with "
                 "kto, of its KTOConfig. Repeatable."),
)  # fmt: skip


def adapter_on_base(base: str, directory: str) -> Callable[..., Any]:
    """Return a decorator that adds ADAPTER, ``--base`` and ``--output``."""
    return _all(
        click.argument("adapter", type=click.Path(path_type=Path)),
        click.option("--base", help=f"{base}: directory or hub id.  [default: found from ADAPTER]"),
        output(directory),
    )


def options(
    model: type[BaseModel],
    short: dict[str, str] | None = None,
    skip: Iterable[str] = (),
    parent: str = "",
    hidden: bool = False,
) -> Callable[..., Any]:
    """Return a decorator that adds an option for every field of ``model``.

    Args:
        short: shorter option names by field, beside the field's own: ``{"learning_rate": "--lr"}``.
        parent: the option that they belong to, if there is one, for the help texts.
        hidden: whether the help leaves them out, because another command's help has them.
    """

    added = []
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        flags = [f"--{name.replace('_', '-')}"]
        if short and name in short:
            flags.insert(0, short[name])
        default = None if field.default is PydanticUndefined else field.default
        settings: dict[str, Any] = {
            "default": default,
            "help": f"With {parent}: {_uncapitalised(field.description)}" if parent else field.description,
            "show_default": default is not None,
            "hidden": hidden,
        }
        kind = _kind(field.annotation)
        if kind is bool:
            flags = [f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags]
        else:
            settings.update(type=kind)
        if _is_list(field.annotation):
            settings.update(multiple=True, default=None, show_default=False)
        added.append(click.option(*flags, name, **settings))
    return _all(*added)


def _uncapitalised(text: str | None) -> str:
    return f"{text[0].lower()}{text[1:]}" if text else ""


def explicit(model: type[BaseModel], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a command's values into the settings that the user gave, and the rest.

    Returns:
        The settings that the user gave, by name, and all other values.
    """
    named = named_options()
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name in model.model_fields and name in named
    }
    return settings, {name: value for name, value in values.items() if name not in model.model_fields}


def named_options() -> set[str]:
    """Return the options of the running command that the user gave, by the names of their values."""
    context = click.get_current_context()
    assert context is not None
    return {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}


def _kind(annotation: Any) -> Any:
    """Return the type of an option's value: str if several are possible, for the settings class to parse."""
    if _is_list(annotation):
        return str
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        return _kind(kinds[0]) if len(kinds) == 1 else str
    return annotation if annotation in (int, float, bool) else str


def _is_list(annotation: Any) -> bool:
    return list in (get_origin(annotation), *(get_origin(part) for part in get_args(annotation)))


def pairs(texts: Iterable[str]) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` texts; values are parsed as JSON if possible, else kept as text."""
    fields: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise EmlocError(f"--set {text} is not KEY=VALUE.", "Write, for example, --set warmup_steps=10.")
        try:
            fields[key] = json.loads(value)
        except json.JSONDecodeError:
            fields[key] = value
    return fields
