"""Ways to spoil a good file: each returns a function that takes the directory of the good inputs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def edit_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change the content of a JSON file, or replace it."""

    def spoil(root: Path) -> None:
        path = root / name
        content = json.loads(path.read_text())
        changed = change(content)
        write(path, json.dumps(content if changed is None else changed))

    return spoil


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    """Set the value at ``keys`` of an object."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[[Any], None]:
    """Remove the value at ``keys`` of an object."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def write(path: Path, content: str | bytes) -> None:
    """Replace a file, or whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def file(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Replace a file's content."""
    return lambda root: write(root / name, content)


def gone(name: str) -> Callable[[Path], None]:
    """Remove a file."""
    return lambda root: (root / name).unlink()


def directory(name: str) -> Callable[[Path], None]:
    """Put a directory where there was a file."""

    def spoil(root: Path) -> None:
        (root / name).unlink()
        (root / name).mkdir()

    return spoil


def link(name: str, target: str) -> Callable[[Path], None]:
    """Put a link where there was a file or directory."""

    def spoil(root: Path) -> None:
        write(root / name, b"")
        (root / name).unlink()
        (root / name).symlink_to(target)

    return spoil


def shard(name: str) -> Callable[[Path], Path]:
    """Return a function that finds the first shard of a directory."""
    return lambda root: min((root / name).glob("*.safetensors"))


def edit_header(folder: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header of a directory's first shard; a result of bytes or text is the new header as it is."""

    def spoil(root: Path) -> None:
        path = shard(folder)(root)
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        changed = change(header)
        new = header if changed is None else changed
        text = new if isinstance(new, bytes) else (new if isinstance(new, str) else json.dumps(new)).encode()
        write(path, len(text).to_bytes(8, "little") + text + content[8 + length :])

    return spoil


def edit_bytes(folder: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the bytes of a directory's first shard."""

    def spoil(root: Path) -> None:
        path = shard(folder)(root)
        write(path, change(path.read_bytes()))

    return spoil


def edit_tensors(folder: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the tensors of a directory's first shard, and write it as the library does, with the same metadata."""

    def spoil(root: Path) -> None:
        path = shard(folder)(root)
        with safe_open(str(path), framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(path)
        changed = change(tensors)
        path.unlink()
        save_file(tensors if changed is None else changed, path, metadata)

    return spoil


def first(header: dict[str, Any]) -> str:
    """Return the first tensor of a header."""
    return next(key for key in header if key != "__metadata__")


def both(*spoilers: Callable[[Path], object]) -> Callable[[Path], None]:
    """Spoil in several ways."""

    def spoil(root: Path) -> None:
        for spoiler in spoilers:
            spoiler(root)

    return spoil


def deep(opening: str, closing: str, depth: int = 100_000) -> str:
    """Return brackets in brackets."""
    return opening * depth + closing * depth
