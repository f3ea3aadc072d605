"""Writes the pages that come from code and benchmarks: settings, keys of recipes, decisions, the map of the code.

Run by `make docs`.
"""

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from emloc_core import settings
from emloc_core.compat.tested import TESTED
from emloc_core.recipe.recipe import AnswersSection, DataSection, EvalSection, ModelSection, Recipe
from emloc_core.requests import EvalRows, EvaluateRequest

HERE = Path(__file__).parent
ROOT = HERE.parent

STAGES: dict[str, type[BaseModel]] = {
    "compress": settings.CompressSettings,
    "train": settings.TrainSettings,
    "correct": settings.CorrectSettings,
    "polish": settings.PolishSettings,
    "polish, train --exact": settings.ExactSettings,
    "export": settings.ExportSettings,
    "evaluate": EvaluateRequest,
}


def settings_page() -> str:
    """Return every setting of every stage with its default, once."""
    descriptions: dict[str, Any] = {}
    parts = [
        "# Settings\n\nOn the command line a setting is an option (`learning_rate` is `--learning-rate`, a field of "
        "`extra` is `--set KEY=VALUE`); in Python, a keyword of the stage's function, except `memory` and `park` of "
        "exact steps, which go into `limits={...}`. [Recipes](recipes.md#keys) lists the keys of a recipe.\n"
    ]
    for stage, model in STAGES.items():
        rows = [
            _item(name, field)
            for name, field in model.model_fields.items()
            if not field.is_required() and descriptions.get(name) != field.description
        ]
        parts += [f"## {stage}\n", "\n".join(rows), ""]
        descriptions |= {name: field.description for name, field in model.model_fields.items()}
    return "\n".join(parts)


def recipes_page() -> str:
    """Return the page about recipes with a list of every key."""
    stages = tuple(f"{stage}." for stage in STAGES)
    rows = [_item(name, field) for name, field in _keys(Recipe, "") if not name.startswith(stages)]
    return _between_marks(HERE / "recipes.md", "\n".join(rows) + "\n", "keys")


def _item(name: str, field: FieldInfo) -> str:
    """Return the line of a list that says what a field means, with its default if it has one."""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    value = "" if default is None or default in ({}, []) else f" = {default!r}"
    return f"- `{name}{value}`: {'Required. ' if field.is_required() else ''}{field.description or ''}"


def _keys(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name of every key of a recipe, and its field."""
    for name, field in section.model_fields.items():
        inner = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        nested = next((part for part in inner if issubclass(part, BaseModel)), None)
        by_name = get_origin(field.annotation) is dict
        if nested is not None and not by_name:
            yield from _keys(nested, f"{prefix}{name}.")
        else:
            key = f"{prefix}{name}" + (".NAME" if nested is not None else "")
            yield key, field


#: The numbers of the records of decisions, by topic; records without a topic come last.
TOPICS = {
    "The method": "0001 0002 0009 0024 0026 0046 0396",
    "Formats of emulators": "0171 0016 0017 0018 0020 0021 0380 0370 0364",
    "Experts and vocabulary": "0033 0390 0391 0250 0350 0351 0260 0261",
    "Families": "0201 0211 0213 0290",
    "Memory": "0122 0141 0300 0301 0361 0406 0418",
    "Speed": "0003 0013 0104 0240 0280 0362 0400 0409 0415 0417",
    "Files, outputs and zoos": "0008 0010 0042 0050 0151 0162 0196 0222 0395 0037",
    "Code and tests": "0161 0191 0302 0416",
}


def decisions_page() -> str:
    """Return the list of the records of decisions, by topic."""
    records = {path.name[:4]: path for path in sorted((HERE / "decisions").glob("[0-9]*.md"))}
    topics = {topic: numbers.split() for topic, numbers in TOPICS.items()}
    topics["Others"] = sorted(records.keys() - {number for numbers in topics.values() for number in numbers})
    page = "# Decisions\n\nWhat someone may question, one short record each.\n"
    for topic, numbers in topics.items():
        lines = [f"- [{_title(records[number])}]({records[number].name})" for number in numbers if number in records]
        page += f"\n## {topic}\n\n" + "\n".join(lines) + "\n" if lines else ""
    return page


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def architecture_page() -> str:
    """Return the page about the architecture with its map: a line per package and module of the core."""
    return _between_marks(HERE / "architecture.md", f"```text\n{_map(rooms())}```\n")


def rooms() -> dict[str, str]:
    """Return the first sentence of every package and module directly in the core, the top layer first."""
    order = {room.partition(".")[0]: number for number, floor in enumerate(_floors()) for room in floor}
    paths = [
        path for path in (ROOT / "emloc_core").glob("[!_]*") if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    paths.sort(key=lambda path: (-order[path.stem], path.name))
    return {
        f"{path.name}/" if path.is_dir() else path.name: _sentence(path / "__init__.py" if path.is_dir() else path)
        for path in paths
    }


def _floors() -> list[list[str]]:
    """Return the import layers that the test of directions has, the lowest first."""
    for node in ast.parse((ROOT / "tests" / "test_directions.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return ast.literal_eval(node.value)
    raise ValueError("tests/test_directions.py has no FLOORS")


def _sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring, as Markdown."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", re.split(r"(?<=[.?!])\s", text)[0].replace("``", "`"))


def _map(entries: dict[str, str]) -> str:
    width = max(map(len, entries)) + 2
    return "".join(f"{name:{width}}{sentence.replace('`', '')}\n" for name, sentence in entries.items())


def measured(page: str, *benchmarks: str) -> str:
    """Return a page with the first table of the results of benchmarks."""
    text = (HERE / page).read_text(encoding="utf-8")
    for benchmark in benchmarks:
        results = (ROOT / "benchmarks" / "results" / f"{benchmark}.md").read_text(encoding="utf-8")
        table = next(part for part in results.split("\n\n") if part.startswith("|"))
        text = _between_marks(HERE / page, f"{table.strip()}\n", benchmark, text)
    return text


#: Settings that Python's functions take as keywords, and the names of the types of those keywords.
KEYWORDS: dict[type[BaseModel], str] = {
    settings.CompressSettings: "CompressKwargs",
    settings.TrainSettings: "TrainKwargs",
    settings.PolishSettings: "PolishKwargs",
    settings.ExactSettings: "ExactKwargs",
    EvalRows: "EvalRowsKwargs",
    settings.CorrectSettings: "CorrectKwargs",
    settings.ExportSettings: "ExportKwargs",
    ModelSection: "ModelKwargs",
    DataSection: "DataKwargs",
    AnswersSection: "AnswersKwargs",
    EvalSection: "EvalKwargs",
    Recipe: "RecipeKwargs",
}
#: Keyword types of functions that take only some of the settings.
_SOME = {
    "PlanKwargs": (settings.TrainSettings, settings.MEMORY_SETTINGS),
    "EvaluateKwargs": (EvaluateRequest, ("limit", "batch_size", "chat", "seed")),
}


def versions() -> str:
    """Return the README with the table of libraries whose private parts are used."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    ranges = {re.split(r"[<>=!]", text)[0]: re.sub(r"^[\w-]+", "", text).replace(",", ", ") for text in wanted}
    lines = [f"| {name} | `{ranges[name]}` | {tested} | {use} |" for name, (tested, use) in TESTED.items()]
    head = "| library | range | tested up to | private parts used |\n| --- | --- | --- | --- |\n"
    return _between_marks(ROOT / "README.md", head + "\n".join(lines) + "\n", "versions")


def keywords() -> str:
    """Return the module with the types of the keywords that Python's functions take as settings."""
    text = (
        '"""The settings as keywords, for editors and type checkers: written by `make docs` from the settings."""\n\n'
        "from typing import Any, Literal, TypedDict\n"
    )
    some = {name: (model, tuple(model.model_fields)) for model, name in KEYWORDS.items()} | _SOME
    for name, (model, fields) in some.items():
        schemas = model.model_json_schema(mode="validation")["properties"]  # of the input, not of the validated value
        lines = "".join(f"    {field}: {_typed(schemas[field])}\n" for field in fields)
        text += f'\n\nclass {name}(TypedDict, total=False):\n    """Of :class:`{model.__name__}`."""\n\n{lines}'
    return text


def _typed(schema: dict[str, Any]) -> str:
    """Return the type of a JSON schema as Python writes it."""
    if "$ref" in schema:
        return next(name for model, name in KEYWORDS.items() if schema["$ref"].endswith(f"/{model.__name__}"))
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(map(_typed, schema["anyOf"])))
    if "enum" in schema or "const" in schema:
        return f"Literal[{', '.join(json.dumps(value) for value in schema.get('enum', [schema.get('const')]))}]"
    if schema.get("type") == "array":
        return f"list[{_typed(schema['items'])}]"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"dict[str, {_typed(inner) if isinstance(inner, dict) else 'Any'}]"
    plain = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}
    return plain.get(schema.get("type", ""), "Any")


def notebook() -> str:
    """Return the tutorial as a notebook: a cell per block of Python, and one per text between them."""
    text = (HERE / "tutorial.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\((\w+\.md)", r"](../docs/\1", text)
    cells: list[dict[str, Any]] = []
    for number, part in enumerate(re.split(r"```python\n(.*?)```\n", text, flags=re.DOTALL)):
        if source := part.strip():
            code = {"execution_count": None, "outputs": []} if number % 2 else {}
            kind = "code" if number % 2 else "markdown"
            lines = source.splitlines(keepends=True)
            cells.append({"cell_type": kind, "id": f"cell-{number}", "metadata": {}, **code, "source": lines})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    content = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _between_marks(path: Path, content: str, mark: str = "map", text: str | None = None) -> str:
    """Return a file's text with ``content`` between the comments that mark its place.

    Raises:
        ValueError: the file has no such marks.
    """
    text = path.read_text(encoding="utf-8") if text is None else text
    begin, end = f"<!-- {mark}: written by `make docs` -->\n", f"<!-- end of {mark} -->\n"
    if begin not in text or end not in text:
        raise ValueError(f"{path} has no {begin.strip()} and {end.strip()}")
    return f"{text[: text.index(begin)]}{begin}\n{content}\n{text[text.index(end) :]}"


PAGES: dict[Path, Callable[[], str]] = {
    HERE / "settings.md": settings_page,
    HERE / "recipes.md": recipes_page,
    HERE / "architecture.md": architecture_page,
    HERE / "decisions" / "index.md": decisions_page,
    HERE / "polish.md": partial(measured, "polish.md", "batches", "rates"),
    ROOT / "README.md": versions,
    ROOT / "emloc_core" / "keywords.py": keywords,
    ROOT / "examples" / "first_model.ipynb": notebook,
}

if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
