"""The tasks of an evaluation: the user's YAML files, checked before anything is loaded, and lm-eval's bundled ones.

lm-eval resolves ``data_files`` against the working directory and looks up tasks by name. Here a task is a file,
paths of data are relative to it, and its digest covers everything that determines a result: the YAML, its includes, the
functions that it names, the data and their pictures.
"""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from emloc_core.compat.lm_eval import load_yaml, sandbox_templates
from emloc_core.errors import EmlocError, did_you_mean, typed_line
from emloc_core.evaluation.images import find_pictures, hash_pictures, picture_directory, shows_pictures
from emloc_core.files.hub_cache import require_cache
from emloc_core.files.inputs import Inputs
from emloc_core.files.limits import unpacking

#: Loaders bundled with ``datasets``; any other ``dataset_path`` is a hub dataset, or a directory.
_LOCAL_FORMATS = {"json", "csv", "parquet", "text", "arrow"}
_OUTPUT_TYPES = ["loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until"]
#: Keys of a task file that lm-eval reads in addition to those of its TaskConfig.
_STRUCTURE = {"include", "tag", "class"}
_FUNCTION = "!function "


@dataclass(frozen=True)
class TaskSpec:
    """One task: ``path`` is the user's YAML file, or None for a task bundled with lm-eval.

    ``shows_images`` is whether the file has ``doc_to_image``; for a bundled task that is known once it is loaded.
    """

    name: str
    path: Path | None
    digest: str = ""
    shows_images: bool = False


def find_task(task: str, inputs: Inputs) -> TaskSpec:
    """Find and check a task: the path of a YAML file; anything else is a name for :func:`require_bundled`.

    Raises:
        EmlocError: there is no such file, it is not valid, or its data are missing.
    """
    path = Path(task)
    if path.suffix in (".yaml", ".yml") or path.exists() or len(path.parts) > 1:
        return _find_file(path, inputs)
    return TaskSpec(task, None, "lm-eval")


def load_task(spec: TaskSpec) -> list[Any]:
    """Return lm-eval's task objects for ``spec``: one for a file, several for a bundled group of tasks.

    Raises:
        EmlocError: lm-eval refuses the file, or the data cannot be downloaded; for a task with images also when its
            requests are built (see :func:`emloc_core.evaluation.images.find_pictures`).
    """
    from lm_eval.tasks import TaskManager

    where = spec.path or f"lm-eval's task {spec.name}"
    data: list[Path] = []
    sandbox_templates()
    try:
        if spec.path is None:
            loaded = TaskManager().load([spec.name])
        else:
            content = _with_absolute_data(load_yaml(spec.path), spec.path)
            data = [Path(file) for file in _data_files(content)]
            with unpacking(data):
                loaded = TaskManager(include_defaults=False).load([content])
    except EmlocError:
        raise
    except (ConnectionError, TimeoutError) as error:
        raise EmlocError(
            f"The data of {where} come from the hub, which cannot be reached ({error}).",
            "Check the connection, or write a task on a local file: emloc eval --new-task.",
            code="unavailable",
        ) from error
    except Exception as error:  # templates, functions and lm-eval itself may raise anything
        require_cache(error)
        reason = typed_line(error)
        raise EmlocError(f"lm-eval cannot build {where} ({reason}).", "Correct the task file or its data.") from error
    tasks = list(loaded["tasks"].values())
    for task in filter(shows_pictures, tasks):
        find_pictures(task, picture_directory(data))
    return tasks


def is_conversational(task: Any) -> bool:
    """Return whether the rows of an lm-eval task are conversations in TRL's convention, which need a chat template."""
    row = task.eval_docs[0]
    columns = [row.get(name) for name in ("messages", "prompt")] if isinstance(row, dict) else []
    turns = [column[0] for column in columns if isinstance(column, list) and column]
    return any(isinstance(turn, dict) and "role" in turn for turn in turns)


def read_task_file(path: Path) -> tuple[list[Path], dict[str, Any]]:
    """Read a task file without lm-eval, which takes seconds to import.

    Returns:
        All files read, and the content, with its data files as absolute paths.

    Raises:
        EmlocError: there is no such file, it is not valid, or its data are missing.
    """
    if not path.is_file():
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("*.y*ml")])
        raise EmlocError(f"There is no task file {path}.{near}", "`emloc eval --new-task` writes one for your data.",
                         code="missing")  # fmt: skip
    files, content = _read_task(path)
    if not isinstance(content.get("task"), str):
        raise EmlocError(
            f"{path} does not say `task: NAME`.", "Give the task a name (a group: name its files instead)."
        )
    content = _with_absolute_data(content, path)
    missing = [file for file in _data_files(content) if not Path(file).is_file()]
    if missing:
        raise EmlocError(
            f"{path} names the data file {missing[0]}, which does not exist.",
            "data_files are relative to the task file; correct the path.",
            code="missing",
        )
    return files, content


def _find_file(path: Path, inputs: Inputs) -> TaskSpec:
    files, content = read_task_file(path)
    _check_keys(path, content)
    data = [Path(file) for file in _data_files(content)]
    functions = sorted(filter(Path.is_file, _function_files(content, path)))
    inputs.hash([*files, *functions])
    own = hashlib.sha256("".join(file.read_text("utf-8") for file in [*files, *functions]).encode()).hexdigest()
    rows = [*data, *_files_of_a_directory(content)]
    digest, declared = f"{own}-{inputs.hash(sorted(rows))}", content.get("doc_to_image")
    if declared is not None:
        digest += f"-{hash_pictures(data, declared, inputs)}"
    return TaskSpec(content["task"], path.resolve(), digest, declared is not None)


def _read_task(path: Path, seen: tuple[Path, ...] = ()) -> tuple[list[Path], dict[str, Any]]:
    """Read a task file without importing anything; return all files read, and the merged content."""
    if path in seen:
        raise EmlocError(f"{path} includes itself.", "Remove the circular include.")
    try:
        content = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise EmlocError(f"{seen[-1]} includes {path}, which does not exist.", "Correct the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise EmlocError(f"{path} is not valid YAML: {reason}", "Correct the file.") from None
    if not isinstance(content, dict):
        raise EmlocError(f"{path} does not hold keys and values.", "Correct the file.")
    files, merged = [path], {}
    includes = content.pop("include", [])
    for name in includes if isinstance(includes, list) else [includes]:
        more, included = _read_task(path.parent / str(name), (*seen, path))
        files += more
        merged.update(included)
    return files, {**merged, **content}


class _Loader(yaml.SafeLoader):
    """Reads ``!function module.name`` as a string that starts with ``!function``: nothing is imported."""


_Loader.add_constructor("!function", lambda loader, node: _FUNCTION + str(loader.construct_scalar(node)))  # type: ignore[arg-type]


def _check_keys(path: Path, content: dict[str, Any]) -> None:
    from lm_eval.config.task import TaskConfig

    names = sorted({*TaskConfig.__dataclass_fields__, *_STRUCTURE})
    for key in content:
        if key not in names:
            raise EmlocError(f"{path} has the unknown key {key!r}.{did_you_mean(str(key), names)}", "Correct the key.")
    kind = content.get("output_type", "generate_until")
    if kind not in _OUTPUT_TYPES:
        near = did_you_mean(str(kind), _OUTPUT_TYPES)
        raise EmlocError(f"{path} has the output_type {kind!r}.{near}", f"Choose one of: {', '.join(_OUTPUT_TYPES)}.")


def _with_absolute_data(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the content of a task file with its data files as absolute paths."""
    settings = content.get("dataset_kwargs")
    if content.get("dataset_path") not in _LOCAL_FORMATS or not isinstance(settings, dict):
        return content
    files = settings.get("data_files")
    return {**content, "dataset_kwargs": {**settings, "data_files": _absolute(files, path.resolve().parent)}}


def _absolute(files: Any, directory: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(value, directory) for split, value in files.items()}
    if isinstance(files, list):
        return [_absolute(value, directory) for value in files]
    if not isinstance(files, str) or "://" in files:
        return files
    joined = str(directory / files)
    return sorted(glob.glob(joined, recursive=True)) or joined if glob.has_magic(files) else joined


def _data_files(content: dict[str, Any]) -> Iterator[str]:
    """Yield the local files of rows that a task's content names."""
    settings = content.get("dataset_kwargs")
    named = _texts(settings.get("data_files")) if isinstance(settings, dict) else ()
    return (text for text in named if "://" not in text)


def _files_of_a_directory(content: dict[str, Any]) -> Iterator[Path]:
    """Yield the files of a data set that is a local directory, without the files of git or the hub."""
    path = content.get("dataset_path")
    if isinstance(path, str) and path not in _LOCAL_FORMATS and Path(path).is_dir():
        for file in filter(Path.is_file, Path(path).rglob("*")):
            if not any(part.startswith(".") for part in file.relative_to(path).parts):
                yield file


def _function_files(content: dict[str, Any], path: Path) -> set[Path]:
    """Return the files of all functions that a task's content calls, as ``module.name``."""
    names = [text.removeprefix(_FUNCTION) for text in _texts(content) if text.startswith(_FUNCTION)]
    return {path.parent / f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in names}


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value of YAML, but not its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def require_bundled(tasks: Sequence[str]) -> None:
    """Refuse names of tasks that lm-eval does not have; listing its tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    names = TaskManager().all_tasks
    for name in tasks:
        if name not in names:
            raise EmlocError(
                f"There is no task file {name}, and lm-eval has no task of that name.{did_you_mean(name, names)}",
                "Give the path of a task file, or a name that `lm-eval ls tasks` prints.",
                code="missing",
            )
