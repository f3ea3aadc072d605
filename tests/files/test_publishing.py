"""A published output was made by the request in its manifest, whenever a run is killed and whatever runs next."""

import errno
import os
import shutil
import sys
import threading
from contextlib import suppress
from unittest.mock import Mock, patch

import pytest
from support.adapters import contents, make_adapter
from support.jobs import merge_job
from support.killed import kill, run_until_killed

from emloc_core.errors import EmlocError
from emloc_core.files import lock, workspace
from emloc_core.files import output as publishing
from emloc_core.files.documents import write_json
from emloc_core.files.manifest import read_manifest
from emloc_core.files.output import Output
from emloc_core.files.workspace import Workspace

PUBLISHING = {module.__file__ for module in (lock, publishing, workspace)}
WHOLE = ["README.md", "emloc.json", "part", "parts", "parts/weights", "timing.json"]


def build(directory, name):
    """Make an output of two files that name their request; existing ones are kept, as stages do."""
    output = Output(directory / "out", "adapter", {"name": name})
    if output.is_finished():
        return
    with output.build() as staging:
        (staging / "parts").mkdir(exist_ok=True)
        for file in (staging / "part", staging / "parts" / "weights"):
            if not file.exists():
                file.with_name(f".{file.name}.tmp").write_text(name)
                os.replace(file.with_name(f".{file.name}.tmp"), file)


def made_by(directory):
    """Return the request of the published output, of which every file must be."""
    out = directory / "out"
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*")) == WHOLE
    name = read_manifest(out)["request"]["name"]
    assert {(out / "part").read_text(), (out / "parts" / "weights").read_text()} == {name}
    return name


def in_a_fork_killed_at(line, run, *args):
    """Run a function in a fork that is killed at the so-many-th new line of these modules; return whether it was."""
    child = os.fork()
    if child == 0:
        seen = set()

        def trace(frame, event, _):
            if frame.f_code.co_filename not in PUBLISHING:
                return None
            if event == "line":
                seen.add((frame.f_code, frame.f_lineno))
                if len(seen) == line:
                    kill()
            return trace

        sys.settrace(trace)
        try:
            run(*args)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.fixture
def killed_everywhere(tmp_path, monkeypatch):
    """A function that yields a directory for every line of a run, in which the run was killed there."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a kill loses nothing that is not synced
    monkeypatch.setattr(publishing, "versions", lambda: {"emloc": "1"})

    def attempt(run, prepare=lambda _: None):
        for line in range(1, 2000):
            directory = tmp_path / "place"
            directory.mkdir()
            prepare(directory)
            if not in_a_fork_killed_at(line, run, directory):
                assert line > 10
                return
            yield directory
            shutil.rmtree(directory)

    return attempt


@pytest.mark.thorough
def test_whatever_is_run_after_a_kill_at_any_line(killed_everywhere, tmp_path):
    again, refused = tmp_path / "again", 0
    for directory in killed_everywhere(lambda directory: build(directory, "A")):
        shutil.copytree(directory, again)
        build(again, "A")
        assert made_by(again) == "A"
        assert os.listdir(again) == ["out"]
        shutil.rmtree(again)
        if Workspace(directory / "out").is_started or (directory / "out").exists():
            refused += 1
            with pytest.raises(EmlocError, match="something else: "):
                build(directory, "B")
            build(directory, "A")
            assert made_by(directory) == "A"
        else:
            build(directory, "B")
            assert made_by(directory) == "B"
        assert os.listdir(directory) == ["out"]
    assert refused > 15


def leave_work(directory):
    with suppress(KeyboardInterrupt), Output(directory / "out", "adapter", {"name": "B"}).build() as staging:
        (staging / "part").write_text("B")
        raise KeyboardInterrupt


def test_a_kill_while_work_is_removed_leaves_nothing_that_is_taken_for_work(killed_everywhere):
    for directory in killed_everywhere(lambda directory: Workspace(directory / "out").discard(), leave_work):
        if Workspace(directory / "out").request.exists():
            build(directory, "B")
            assert made_by(directory) == "B"
        else:
            build(directory, "A")
            assert made_by(directory) == "A"
        assert os.listdir(directory) == ["out"]


@pytest.mark.parametrize("name", ["A", "B"])
def test_while_one_process_publishes_another_is_refused(tmp_path, monkeypatch, name):
    syncing, proceed = threading.Event(), threading.Event()
    first = threading.Thread(target=build, args=(tmp_path, "A"))

    def slow(_):
        if threading.current_thread() is first:
            syncing.set()
            assert proceed.wait(60)

    monkeypatch.setattr(publishing, "_fsync", slow)
    first.start()
    assert syncing.wait(60)
    with pytest.raises(EmlocError, match="Another process is writing"):
        build(tmp_path, name)
    proceed.set()
    first.join()
    assert made_by(tmp_path) == "A"
    assert os.listdir(tmp_path) == ["out"]


def test_many_at_once_make_one_output_of_one_request(tmp_path):
    children = []
    for name in "ABAB" * 3:
        child = os.fork()
        if child == 0:
            try:
                build(tmp_path, name)
                os._exit(0)
            except EmlocError:
                os._exit(1)
            finally:
                os._exit(70)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 1}
    assert 0 in codes
    made_by(tmp_path)
    assert os.listdir(tmp_path) == ["out"]


def test_files_of_others_in_the_place_of_the_work_are_refused(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "weights").write_text("A")
    with pytest.raises(EmlocError, match=r"\.out\.partial holds weights") as caught:
        build(tmp_path, "B")
    assert caught.value.code == "exists"
    assert [path.name for path in tmp_path.rglob("*")] == [".out.partial", "weights"]


def test_what_somebody_else_puts_in_the_place_meanwhile_is_left(tmp_path):
    output = Output(tmp_path / "out", "adapter", {})

    def attempt():
        with output.build() as staging:
            (staging / "part").write_text("x")
            output.path.mkdir()
            (output.path / "mine").write_text("y")

    with pytest.raises(EmlocError) as caught:
        attempt()
    assert caught.value.code == "exists"
    assert [path.name for path in output.path.iterdir()] == ["mine"]
    (output.path / "mine").unlink()
    with output.build() as staging:  # an empty directory is replaced
        assert (staging / "part").read_text() == "x"
    assert output.is_finished()


@pytest.mark.parametrize("target", ["nowhere", "empty"])
def test_a_link_is_no_place_for_an_output(tmp_path, target):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    with pytest.raises(EmlocError, match="is a link"):
        build(tmp_path, "A")


def merge(*job):
    base, adapter, output = job
    return merge_job(adapter, base, output).run()


def merge_until_synced(*job):
    publishing._fsync = lambda _: kill()
    merge(*job)


def test_a_merge_that_is_killed_while_it_is_synced(tiny_model, tmp_path):
    first, second = (make_adapter(tiny_model, tmp_path / str(size), size=size) for size in (0.05, 0.1))
    run_until_killed(merge_until_synced, tiny_model, first, tmp_path / "out")
    with pytest.raises(EmlocError, match="something else: the adapter changed"):
        merge(tiny_model, second, tmp_path / "out")
    merge(tiny_model, first, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(merge(tiny_model, first, tmp_path / "whole"))


def test_names_with_a_leading_dot_are_never_published(tmp_path):
    with Output(tmp_path / "out", "adapter", {"name": "A"}).build() as staging:
        (staging / "parts").mkdir()
        for file in ("part", "parts/weights", ".part.json.tmp", ".base.log", "parts/.weights.tmp"):
            (staging / file).write_text("A")
        (staging / ".spectra.partial" / "content").mkdir(parents=True)
    assert made_by(tmp_path) == "A"


def test_json_that_cannot_be_written_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "some.json"
    write_json(path, 1)
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with patch.object(os, "fsync", full), pytest.raises(OSError, match="No space"):
        write_json(path, 2)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("some.json", "1\n")]
    (tmp_path / ".some.json.tmp").write_text("[half of what a killed writer wanted to w")
    write_json(path, 3)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("some.json", "3\n")]
