"""Files of a model that are links to somewhere else, pipes or devices: neither read nor copied."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emloc_core.adapters.adapter import Adapter
from emloc_core.data.images import Picture
from emloc_core.data.tokenize import load_tokenizer
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.documents import read_json, read_toml
from emloc_core.files.header import read_header
from emloc_core.files.inputs import Inputs


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def lead_elsewhere(path: Path) -> None:
    secret = path.parents[1] / "secret"
    secret.write_text("secret") if not path.exists() else path.replace(secret)
    path.symlink_to(secret)


def lead_to_zeros(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


BAD = [lead_elsewhere, lead_to_zeros, make_pipe]


@pytest.mark.parametrize("make", BAD)
@pytest.mark.parametrize(
    "name", ["notes.txt", "config.json", "model.safetensors", "tokenizer.json", "calibration.jsonl"]
)
def test_a_models_files_are_its_own(model: Path, name: str, make: Callable[[Path], None]) -> None:
    make(model / name)
    with pytest.raises(EmlocError, match=r"link to a file outside|not a regular file"):
        Checkpoint(model)


@pytest.mark.parametrize("make", BAD)
def test_a_tokenizers_files_are_its_own(model: Path, make: Callable[[Path], None]) -> None:
    make(model / "tokenizer.json")
    with pytest.raises(EmlocError, match=r"link to a file outside|not a regular file"):
        load_tokenizer(model)


@pytest.mark.parametrize("make", BAD)
def test_an_adapters_files_are_its_own(tmp_path: Path, make: Callable[[Path], None]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").touch()
    make(adapter / "adapter_config.json")
    with pytest.raises(EmlocError):
        Adapter(adapter)


def test_links_do_not_leak_into_what_is_made(
    model: Path, tmp_path: Path, rows_file: Path, emloc: Callable[..., tuple[int, str, str]]
) -> None:
    lead_elsewhere(model / "notes.txt")
    settings = ["--ratio", "0.6", "--samples", 4, "--selection", 2]
    code, _, err = emloc("compress", model, "--data", rows_file, "-o", tmp_path / "out", *settings)
    assert code == 1
    assert "notes.txt is a link to a file outside" in err
    assert not (tmp_path / "out").exists()


def test_links_within_a_model_and_to_the_hubs_blobs_are_followed(tiny_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--some--model"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(tiny_model.iterdir())):
        shutil.copy(path, cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    (snapshot / "again.txt").symlink_to("config.json")
    assert Checkpoint(snapshot).nbytes == Checkpoint(tiny_model).nbytes
    (tmp_path / "linked").symlink_to(snapshot)
    assert Checkpoint(tmp_path / "linked").side_files()
    (cache / "refs").write_text("no blob")
    (snapshot / "notes.txt").symlink_to(Path("..", "..", "refs"))
    with pytest.raises(EmlocError, match="outside"):
        Checkpoint(snapshot)


@pytest.mark.parametrize("make", [lead_to_zeros, make_pipe])
@pytest.mark.parametrize(
    "read",
    [
        read_json,
        read_header,
        lambda path: read_toml(path, "recipe"),
        lambda path: Inputs().hash([path]),
        lambda path: Picture.from_source(path.name, path.parent),
    ],
)
def test_pipes_and_devices_are_not_opened(tmp_path: Path, read: Callable[[Path], Any], make: Any) -> None:
    make(tmp_path / "file")
    with pytest.raises(EmlocError, match="not a regular file"):
        read(tmp_path / "file")
