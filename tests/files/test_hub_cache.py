"""A cache of Hugging Face's libraries that cannot be used is named, and not what was asked for."""

import errno
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import pytest

from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.evaluation.new_task import write_task
from emloc_core.evaluation.tasks import TaskSpec, load_task
from emloc_core.files.checkpoint import open_checkpoint


def test_the_cache_of_rows_is_named_and_not_the_task(rows_file, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"  # cannot be made by the superuser either
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    task = write_task("completion_nll", rows_file, tmp_path / "task.yaml")
    with pytest.raises(EmlocError, match=f"^{cache}, for what.* set HF_DATASETS_CACHE to another directory"):
        load_task(TaskSpec("task", task))


@pytest.mark.parametrize("read", [lambda: load_rows("org/rows"), lambda: open_checkpoint("org/model")])
@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_the_cache_of_the_hub_is_named_and_not_the_name(read, variable, monkeypatch):
    monkeypatch.setenv(variable, "/elsewhere")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", "/elsewhere" if variable == "HF_HOME" else "/home")
    monkeypatch.setattr("emloc_core.data.sources._require_answer", lambda _: None)
    refused = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied", "/elsewhere/hub"))
    monkeypatch.setattr(datasets, "load_dataset", refused)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(EmlocError, match=f"^/elsewhere/hub, .*Permission denied.* set {variable} to another"):
        read()


def test_a_file_elsewhere_is_not_taken_for_a_cache(monkeypatch):
    monkeypatch.setattr("emloc_core.data.sources._require_answer", lambda _: None)
    refused = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied", str(Path("/elsewhere/rows"))))
    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(EmlocError, match="no dataset of that name could be loaded"):
        load_rows("org/rows")
