"""Storage by URL: a partial copy never looks complete, and fetched files stay in their directory."""

from unittest.mock import Mock

import fsspec
import pytest

from emloc_core.errors import EmlocError
from emloc_core.zoo.engines.storage import Storage, fetch_input, input_name, share
from emloc_core.zoo.jobs.faults import classify

MARKER = "emloc.json"


@pytest.fixture(params=["memory", "file"])
def storage(request, tmp_path):
    if request.param == "file":
        return Storage((tmp_path / "remote").as_uri())
    fsspec.filesystem("memory").rm("/", recursive=True)
    return Storage("memory://remote")


@pytest.fixture
def output(tmp_path):
    """A finished directory, with files in a directory of its own."""
    directory = tmp_path / "made"
    (directory / "inner").mkdir(parents=True)
    (directory / "a.safetensors").write_bytes(b"weights")
    (directory / "zeta.json").write_text("{}")
    (directory / "inner" / "b.txt").write_text("text")
    (directory / MARKER).write_text('{"kind": "emulator"}')
    return directory


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_round_trip(storage, output, tmp_path):
    assert not storage.has("jobs/one/emulator")
    storage.publish(output, "jobs/one/emulator")
    assert storage.has("jobs/one/emulator")
    storage.fetch("jobs/one/emulator", tmp_path / "fetched")
    assert contents(tmp_path / "fetched") == contents(output)


@pytest.mark.parametrize("written", range(4))
def test_is_whole_with_its_last_file_alone(storage, output, tmp_path, monkeypatch, written):
    """Interrupted before any of its four files, a copy is not whole; the next one finishes it."""

    def put(source, target):
        if len(copied) == written:
            raise KeyboardInterrupt
        copied.append(target)
        original_put(source, target)

    copied, original_put = [], storage._put
    monkeypatch.setattr(storage, "_put", put)
    with pytest.raises(KeyboardInterrupt):
        storage.publish(output, "emulator")
    assert not storage.has("emulator")
    with pytest.raises(FileNotFoundError):
        storage.fetch("emulator", tmp_path / "half")
    assert not (tmp_path / "half").exists()
    monkeypatch.undo()
    storage.publish(output, "emulator")
    storage.fetch("emulator", tmp_path / "fetched")
    assert contents(tmp_path / "fetched") == contents(output)


def test_removes_what_another_attempt_has_left(storage, output, tmp_path):
    storage.write("emulator/model-00009.safetensors", b"old")
    storage.publish(output, "emulator")
    storage.fetch("emulator", tmp_path / "fetched")
    assert contents(tmp_path / "fetched") == contents(output)


def test_what_is_whole_stays(storage, output, tmp_path):
    storage.publish(output, "emulator")
    (output / "zeta.json").write_text('{"other": 1}')
    storage.publish(output, "emulator")
    storage.fetch("emulator", tmp_path / "fetched")
    assert (tmp_path / "fetched" / "zeta.json").read_text() == "{}"


def test_a_file_is_replaced_whole(storage):
    storage.write("logs/a.log", b"one")
    storage.write("logs/a.log", b"one two")
    assert storage.read("logs/a.log") == b"one two"
    assert storage.files.find(storage._path("logs")) == [storage._path("logs", "a.log")]


def test_an_interrupted_copy_to_a_disk_leaves_no_file_that_looks_right(output, tmp_path, monkeypatch):
    storage = Storage(str(tmp_path / "remote"))

    def put(_source, target):
        fsspec.filesystem("file").pipe_file(target, b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.files, "put_file", put)
    with pytest.raises(OSError, match="No space"):
        storage.publish(output, "emulator")
    assert not contents(tmp_path / "remote")


def test_what_a_killed_writer_has_left_goes_with_the_next_write(tmp_path):
    storage = Storage(str(tmp_path / "remote"))
    storage.write("logs/a.log", b"one")
    with storage._replacing(storage._path("logs/a.log")) as other:
        (tmp_path / "remote/logs/a.log.0f.partial").write_bytes(b"half")
        storage.files.pipe_file(other, b"slow")
        storage.write("logs/a.log", b"two")
    assert contents(tmp_path / "remote") == {"logs/a.log": b"two"}


def test_nothing_is_fetched_out_of_its_directory(storage, output, tmp_path, monkeypatch):
    storage.publish(output, "emulator")
    path = storage._path("emulator", "..", "..", "escaped.txt")
    monkeypatch.setattr(storage.files, "find", lambda _: [path])
    with pytest.raises(EmlocError, match="leads out of its directory"):
        storage.fetch("emulator", tmp_path / "deep" / "fetched")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_inputs(storage, output, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    model, data = share(storage, output), share(storage, rows)
    assert contents(fetch_input(storage, model, tmp_path)) == contents(output)
    assert fetch_input(storage, data, tmp_path).name == "rows.jsonl"
    assert fetch_input(storage, data, tmp_path).read_text() == "{}\n"
    rows.write_text('{"changed": 1}\n')
    assert input_name(rows) != data
    assert fetch_input(storage, share(storage, rows), tmp_path).read_text() == '{"changed": 1}\n'


def test_a_fetch_that_was_killed_at_its_end_leaves_a_file_a_file(storage, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    name = share(storage, rows)
    storage.fetch(name, tmp_path / name, ".whole")
    assert fetch_input(storage, name, tmp_path).read_text() == "{}\n"


def test_what_a_file_system_raises_of_its_own_is_tried_again(storage, output, tmp_path, monkeypatch):
    class EndpointError(Exception):
        pass

    storage.publish(output, "emulator")
    for method in ("isfile", "pipe_file", "cat_file"):
        monkeypatch.setattr(storage.files, method, Mock(side_effect=EndpointError("no route")))
    calls = (
        lambda: storage.has("emulator"),
        lambda: storage.publish(output, "emulator"),
        lambda: storage.fetch("emulator", tmp_path / "fetched"),
        lambda: storage.write("log", b""),
        lambda: storage.read("log"),
    )
    for call in calls:
        with pytest.raises(OSError, match=r"The storage failed \(EndpointError: no route\)") as raised:
            call()
        assert classify(raised.value) == "input/output"


def test_no_such_storage():
    with pytest.raises(EmlocError, match="cannot be used as storage"):
        Storage("nowhere://bucket/zoo")
