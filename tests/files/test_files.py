"""Shards, checkpoints and output directories: whole or absent, and every damage is named."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint, open_checkpoint
from emloc_core.files.documents import read_object, read_toml, write_json
from emloc_core.files.header import read_header
from emloc_core.files.inputs import Inputs
from emloc_core.files.manifest import read_manifest
from emloc_core.files.output import Output, versions
from emloc_core.files.pretrained import load_config, load_model
from emloc_core.files.shards import DTYPES, ShardWriter, row_chunks, write_shard

DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
SHAPE = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(DTYPE, SHAPE), max_size=5).filter(
    lambda tensors: "__metadata__" not in tensors))  # fmt: skip
def test_written_shards_are_read_by_the_library_and_copied_byte_for_byte(tmp_path_factory, layout):
    directory = tmp_path_factory.mktemp("shards")
    tensors = {key: (10 * torch.randn(shape)).to(dtype) for key, (dtype, shape) in layout.items()}
    write_shard(directory / "ours.safetensors", tensors)
    loaded = load_file(directory / "ours.safetensors")
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key].nan_to_num(), tensor.nan_to_num())
    header, metadata = read_header(directory / "ours.safetensors")
    assert {key: DTYPES[info.dtype] for key, info in header.items()} == {key: tensors[key].dtype for key in header}
    layout = {key: (info.dtype, info.shape) for key, info in header.items()}
    for copying in (nullcontext(), without_kernel_copies()):
        with copying, ShardWriter(directory / "copy.safetensors", layout, metadata) as writer:
            for key, info in header.items():
                writer.copy(key, info)
        assert (directory / "copy.safetensors").read_bytes() == (directory / "ours.safetensors").read_bytes()


def without_kernel_copies():
    """As between file systems: the kernel cannot copy from one file to the other."""
    return patch.object(os, "copy_file_range", side_effect=OSError(errno.EXDEV, "Invalid cross-device link"))


@pytest.mark.parametrize("copying", [nullcontext, without_kernel_copies])
def test_a_shard_that_is_cut_short_while_it_is_copied_is_named(tmp_path, copying):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(50)}, path)
    (info,) = read_header(path)[0].values()
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(EmlocError, match="ended within a"), copying(), ShardWriter(
        tmp_path / "copy.safetensors", {"a": (info.dtype, info.shape)}
    ) as writer:  # fmt: skip
        writer.copy("a", info)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("rows", [1, 3, 5, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_matrix_is_read_some_rows_at_a_time(tmp_path, rows, dtype):
    matrix = torch.randn(5, 7).to(dtype)
    save_file({"other": torch.ones(3), "a": matrix}, tmp_path / "model.safetensors")
    info = read_header(tmp_path / "model.safetensors")[0]["a"]
    chunks = [part.clone() for part in row_chunks(info, rows * 7 * dtype.itemsize)]
    assert [len(part) for part in chunks] == [len(part) for part in matrix.split(rows)]
    assert torch.equal(torch.cat(chunks), matrix)


def test_a_shard_appears_when_it_is_whole_or_not_at_all(tmp_path):
    layout = {"a": ("F32", (2,)), "b": ("F32", (2,))}
    with pytest.raises(ValueError, match="lacks"), ShardWriter(tmp_path / "x.safetensors", layout) as writer:
        writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="was expected"), ShardWriter(tmp_path / "x.safetensors", layout) as writer:
        writer.write("b", torch.ones(2))
    with (
        pytest.raises(ValueError, match="as the header"),
        ShardWriter(tmp_path / "x.safetensors", layout) as writer,
    ):
        writer.write("a", torch.ones(3))
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_could_not_be_synced_does_not_look_whole(tmp_path, monkeypatch):
    """A shared disk reports late that it is full: when a file is synced."""
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with (
        pytest.raises(OSError, match="No space"),
        ShardWriter(tmp_path / "x.safetensors", {"a": ("F32", (2,))}) as writer,
    ):
        writer.write("a", torch.ones(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_a_truncated_shard_is_named(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(50)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(EmlocError, match=r"model\.safetensors"):
        read_header(path)


@pytest.mark.parametrize(
    "name",
    ["../../secret.safetensors", "..", "/etc/passwd", "request.json", ".lock", ".hidden.safetensors", "a/b.safetensors",
     "model.bin", ".safetensors", "x\n.safetensors", "x" * 300 + ".safetensors", "", None, 3, ["a.safetensors"]],
)  # fmt: skip
def test_an_index_names_plain_safetensors_files_alone(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(EmlocError) as caught:
        _ = Checkpoint(tmp_path).shards
    assert caught.value.code == "refused"


def test_an_index_and_its_shards_agree(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"c": torch.ones(2)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}))
    assert Checkpoint(tmp_path).tensors.keys() == {"a", "b", "c"}
    for wrong in ({"a": "2.safetensors", "c": "2.safetensors"}, {"d": "1.safetensors"}):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(EmlocError, match=r"lacks (a|d), which model\.safetensors\.index\.json says it holds"):
            _ = Checkpoint(tmp_path).tensors
    save_file({"a": torch.ones(2)}, tmp_path / "2.safetensors")
    index.write_text(json.dumps({"weight_map": {"b": "1.safetensors", "a": "2.safetensors"}}))
    with pytest.raises(EmlocError, match="both hold a"):
        _ = Checkpoint(tmp_path).tensors


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EmlocError, match=r"weights in safetensors.*pickled"):
        _ = Checkpoint(tmp_path).shards


@pytest.mark.parametrize("name", ["/no/such/place", "./nothing", "plain"])
def test_a_model_that_is_not_there(name):
    with pytest.raises(EmlocError, match="no model at"):
        open_checkpoint(name)


def test_a_hub_id_without_a_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EmlocError, match="no such model or cannot be reached"):
        open_checkpoint("someone/something")


def test_a_single_file_beside_an_index_is_read_as_transformers_reads_it(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({key: 2 * tensor for key, tensor in weights.items()}, model / "1.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "1.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint(model).shards == [model / "model.safetensors"]
    assert Checkpoint(model).fingerprint(Inputs()) == Checkpoint(tiny_model).fingerprint(Inputs())
    loaded = load_model("AutoModelForCausalLM", model).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())


def test_damaged_weights_beside_an_index_are_one_error(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(1000))  # transformers takes it before any index
    with pytest.raises(EmlocError, match=r"A file of weights in .* is truncated or damaged"):
        load_model("AutoModelForCausalLM", tmp_path / "model")


def test_fingerprints_follow_content_and_are_cached(tiny_model, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    cache = tmp_path / "cache"
    cache.mkdir()
    first = Checkpoint(copy).fingerprint(Inputs(cache))
    assert first == Checkpoint(tiny_model).fingerprint(Inputs(tmp_path / "other"))
    assert not (copy / ".emloc-hashes.json").exists()
    read = []
    monkeypatch.setattr("hashlib.file_digest", lambda *_: read.append(1))
    assert Checkpoint(copy).fingerprint(Inputs(cache)) == first
    assert read == []
    monkeypatch.undo()
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert Checkpoint(copy).fingerprint(Inputs(cache)) != first


def test_an_output_is_published_whole_with_its_manifest(tmp_path):
    output = Output(tmp_path / "out", "adapter", {"a": 1})
    assert not output.is_finished()
    with output.build() as staging:
        (staging / "weights").write_text("x")
        output.result = {"steps": 3}
        assert not (tmp_path / "out").exists()
    assert output.is_finished()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "emloc.json",
        "timing.json",
        "weights",
    ]
    assert read_manifest(tmp_path / "out")["result"] == {"steps": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_crash_keeps_the_work_and_a_user_error_removes_it(tmp_path):
    output = Output(tmp_path / "out", "adapter", {"a": 1})

    def interrupted():
        with output.build() as staging:
            (staging / "part").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "out").exists()
    with pytest.raises(EmlocError, match="a was 1 and is now 2"), Output(tmp_path / "out", "adapter", {"a": 2}).build():
        pass
    with Output(tmp_path / "out", "adapter", {"a": 1}).build() as staging:
        assert (staging / "part").read_text() == "x"
    with pytest.raises(EmlocError, match="bad"), Output(tmp_path / "other", "adapter", {}).build():
        raise EmlocError("bad input")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    work = tmp_path / ".other.partial" / "content" / "part"

    def out_of_memory(*, after_work):
        with Output(tmp_path / "other", "adapter", {}).build():
            if after_work:
                work.write_text("x")
            raise EmlocError("out of memory", resumable=True)

    for after_work in (False, True):
        with pytest.raises(EmlocError, match="memory"):
            out_of_memory(after_work=after_work)
        assert work.parent.parent.exists() == after_work


def test_a_run_is_resumed_with_the_plugins_that_began_it(tmp_path, monkeypatch):
    output = Output(tmp_path / "out", "emulator", {})
    with pytest.raises(ValueError, match="null"), output.build() as staging:
        os.makedirs(staging / "half" / "\0")
    information = tmp_path / "stranger-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[emloc]\nstranger = no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("emloc_core.files.output.versions", versions.__wrapped__)
    with pytest.raises(EmlocError, match=r'stranger was null and is now "1\.0"'):
        Output(tmp_path / "out", "emulator", {}).build().__enter__()


def test_an_output_that_another_process_finished_meanwhile_is_left_alone(tmp_path):
    first, second = (Output(tmp_path / "out", "adapter", {}) for _ in range(2))
    assert not first.is_finished()
    assert not second.is_finished()
    with first.build() as staging:
        (staging / "weights").write_text("x")
    with pytest.raises(EmlocError) as caught, second.build():
        pass
    assert caught.value.code == "exists"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("path", [".", "..", "/", "file/out", "/proc/out"])
def test_impossible_places_are_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")

    def attempt():
        with Output(path, "adapter", {}).build():
            pass

    with pytest.raises(EmlocError, match=r"not a name for a new directory|cannot be created"):
        attempt()


def test_many_processes_may_share_the_cache_of_hashes(tmp_path):
    code = (
        "import sys, pathlib\nfrom emloc_core.files.documents import write_json\n"
        "for i in range(100): write_json(pathlib.Path(sys.argv[1]), {'i': i})"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "shared.json")]
    writers = [subprocess.Popen(argv, stderr=subprocess.PIPE) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert json.loads((tmp_path / "shared.json").read_text()) == {"i": 99}


@pytest.mark.parametrize("content", ['{"a": NaN}', '{"a": -Infinity}', '{"a":' * 100_000, "[" + "9" * 5000 + "]", "{"])
@pytest.mark.usefixtures("uncollected")
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(EmlocError, match="not valid JSON"):
        read_object(tmp_path / "index.json")


def test_infinity_in_a_config_is_read_as_transformers_writes_it(tmp_path):
    """The configs of Mamba-2 have it."""
    file, limits = tmp_path / "config.json", [0.0, math.inf]
    file.write_text(json.dumps({"model_type": "bamba", "time_step_limit": limits}))
    config = load_config(file)
    assert list(config.time_step_limit) == limits
    read = Checkpoint(tmp_path).config
    write_json(file, read)
    assert list(load_config(file).time_step_limit) == limits
    assert Checkpoint(tmp_path).config == read
    config.save_pretrained(tmp_path)
    assert Checkpoint(tmp_path).config["time_step_limit"] == read["time_step_limit"]


@pytest.mark.parametrize("content", ["[]", '"text"', "3"])
def test_json_of_another_kind_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(EmlocError, match="not an object"):
        Checkpoint(tmp_path)


def test_two_processes_do_not_write_one_output(tmp_path):
    with (
        Output(tmp_path / "out", "adapter", {}).build(),
        pytest.raises(EmlocError, match="Another process"),
        Output(tmp_path / "out", "adapter", {}).build(),
    ):
        pass
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("kind", ["file", "other kind", "foreign directory", "damaged manifest"])
def test_what_is_there_already_is_never_overwritten(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        content = {"other kind": '{"kind": "emulator"}', "damaged manifest": "{"}.get(kind)
        (path / ("emloc.json" if content else "mine.txt")).write_text(content or "mine")
    with pytest.raises(EmlocError):
        Output(path, "adapter", {}).is_finished()
    assert path.exists()


SMALL_DISK = """
    import sys, pathlib
    from emloc_core.errors import EmlocError
    from emloc_core.files.output import Output
    from emloc_core.files.shards import write_shard
    import torch
    place = pathlib.Path(sys.argv[1])
    try:
        with Output(place / "out", "checkpoint", {}).build() as staging:
            write_shard(staging / "first.safetensors", {"a": torch.zeros(1000)})
            write_shard(staging / "second.safetensors", {"a": torch.zeros(4_000_000)})
    except EmlocError as error:
        print(error)
    print(sorted(str(path.relative_to(place)) for path in place.rglob("*.safetensors*")), (place / "out").exists())
"""


def test_a_full_disk_is_one_sentence_and_keeps_finished_shards(tmp_path):
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    script = tmp_path / "fill.py"
    script.write_text(textwrap.dedent(SMALL_DISK))
    mount = f"mount -t tmpfs -o size=4m tmpfs {mount_point} && {sys.executable} {script} {mount_point}"
    isolate = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    done = subprocess.run([*isolate, "sh", "-c", mount], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    message, listing = done.stdout.strip().splitlines()
    assert message.startswith("The disk is full: writing to ")
    assert "run the same command again" in message
    assert listing == "['.out.partial/content/first.safetensors'] False"


@pytest.mark.parametrize("content", ["a = " + "[" * 5000, "a = " + "9" * 5000, "["])
def test_what_is_no_toml_is_named(tmp_path, content):
    (tmp_path / "recipe.toml").write_text(content)
    with pytest.raises(EmlocError, match="not valid TOML"):
        read_toml(tmp_path / "recipe.toml", "recipe")


def test_toml_may_begin_with_the_mark_that_some_editors_write(tmp_path):
    (tmp_path / "recipe.toml").write_text("a = 1", encoding="utf-8-sig")
    assert read_toml(tmp_path / "recipe.toml", "recipe") == {"a": 1}


@pytest.mark.parametrize("model_type", [None, 3, [], {}])
def test_a_model_type_is_a_name(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(EmlocError, match="has no model_type"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ['{"kind": 3}', '{"request": []}', '{"result": null}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "emloc.json").write_text(content)
    with pytest.raises(EmlocError, match=r"is damaged: its (kind|request|result) is a"):
        read_manifest(tmp_path)
