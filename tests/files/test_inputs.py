"""Inputs that change while a stage reads them are found out, and nothing is published of them."""

import os
import shutil

import pytest
from support.adapters import make_adapter
from support.jobs import compress_job, merge_job

from emloc_core.errors import EmlocError
from emloc_core.files.inputs import Inputs
from emloc_core.files.output import Output
from emloc_core.settings import CompressSettings


def overwrite(path):
    """Change a byte, and set the time of change back: size and time are as before."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path):
    """Replace a file by another that differs in one byte."""
    shutil.copy(path, path.with_name("new"))
    overwrite(path.with_name("new"))
    os.replace(path.with_name("new"), path)


CHANGES = {
    "overwritten": overwrite,
    "replaced": replace,
    "removed": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"some bytes")
    return path


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_named_before_anything_is_published(file, tmp_path, change):
    inputs = Inputs(tmp_path)
    output = Output(tmp_path / "out", "adapter", {"weights": inputs.hash([file])}, files=inputs)

    def attempt():
        with output.build() as staging:
            (staging / "part").write_text("x")
            change(file)

    with pytest.raises(EmlocError, match="weights was changed while it was being read"):
        attempt()
    assert {path.name for path in tmp_path.iterdir()} <= {"weights", ".emloc-hashes.json"}


def test_a_change_explains_the_error_of_a_library_that_met_it(file, tmp_path):
    inputs = Inputs(tmp_path)
    output = Output(tmp_path / "out", "adapter", {"weights": inputs.hash([file])}, files=inputs)

    def attempt(spoil):
        with output.build():
            spoil(file)
            raise FileNotFoundError("No such file or directory: weights")

    with pytest.raises(FileNotFoundError):  # of something else
        attempt(lambda path: path.read_bytes())
    with pytest.raises(EmlocError, match="weights was changed while it was being read"):
        attempt(CHANGES["removed"])
    assert {path.name for path in tmp_path.iterdir()} == {".emloc-hashes.json"}


def test_a_new_link_other_rights_and_a_look_are_no_change(file, tmp_path):
    inputs = Inputs()
    inputs.hash([file])
    os.link(file, tmp_path / "link")
    file.chmod(0o400)
    file.read_bytes()
    inputs.verify()


@pytest.mark.parametrize("change", [overwrite, replace])
def test_the_cache_of_hashes_is_not_misled_by_size_and_time(file, tmp_path, change):
    before = Inputs(tmp_path).hash([file])
    assert Inputs(tmp_path).hash([file]) == before
    change(file)
    after = Inputs(tmp_path).hash([file])
    assert after == Inputs().hash([file]) != before


def test_work_that_was_begun_on_files_since_replaced_is_not_continued(file, tmp_path):
    def attempt(content, *, interrupt):
        inputs = Inputs(tmp_path)
        with Output(tmp_path / "out", "adapter", {"weights": inputs.hash([file])}, files=inputs).build() as staging:
            seen = (staging / "part").exists()
            (staging / "part").write_text(content)
            if interrupt:
                raise KeyboardInterrupt
        return seen

    with pytest.raises(KeyboardInterrupt):
        attempt("perhaps of another file", interrupt=True)
    content = file.read_bytes()
    file.write_bytes(b"other")  # while the run read it
    file.write_bytes(content)
    assert not attempt("x", interrupt=False)
    assert (tmp_path / "out" / "part").read_text() == "x"


@pytest.fixture
def base(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "base")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_compress_refuses_a_base_that_changes(base, rows_file, tmp_path, name):
    settings = CompressSettings(samples=4, selection=2, ratio=0.6)
    job = compress_job(base, rows_file, tmp_path / "out", settings)
    with pytest.raises(EmlocError, match=rf"base/{name} was changed"):
        job.run(lambda _description, done, _total: replace(base / name) if done == 1 else None)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("name", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_merge_refuses_a_base_or_an_adapter_that_changes(base, tmp_path, name):
    adapter = make_adapter(base, tmp_path / "adapter")
    job = merge_job(adapter, base, tmp_path / "out")
    with pytest.raises(EmlocError, match=rf"{name} was changed"):
        job.run(lambda *_: replace(tmp_path / name))
    assert not (tmp_path / "out").exists()
