"""Devices, and where waiting samples are kept. What a GPU would do is done here between two places of the CPU."""

import copy
import weakref
from contextlib import contextmanager

import pytest
import torch
from emloc_llama import LLAMA
from support.jobs import compress_job
from torch import nn

from emloc_core.data.rows import load_rows
from emloc_core.doctor import _memory
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.model.absent import Absent
from emloc_core.model.device import choose_device, free_memory
from emloc_core.model.opened import OpenModel
from emloc_core.model.parking import Parking
from emloc_core.model.streaming import Stream
from emloc_core.settings import CompressSettings


def test_auto_is_the_gpu_where_there_is_one():
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu").type == "cpu"


def test_what_a_limited_container_keeps_of_files_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr("emloc_core.processes.group._DIRECTORY", tmp_path)
    machine_memory = free_memory("cpu")
    stat = "anon 100\nfile 750\nactive_file 300\ninactive_file 400\n"
    for name, text in (("memory.max", "1000\n"), ("memory.current", "900\n"), ("memory.stat", stat)):
        (tmp_path / name).write_text(text)
    assert free_memory("cpu") == 800 < machine_memory
    assert _memory() == (800, 1000)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory("cpu") > 1000


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(EmlocError, match="--device"):
        choose_device(name)


@pytest.mark.parametrize(("needed", "limit"), [(0, 50), (30, 50), (70, 30), (200, 0)])
def test_samples_leave_a_gpu_what_fitting_needs(monkeypatch, needed, limit):
    monkeypatch.setattr("emloc_core.model.parking.free_of", lambda _gpu: 100)
    assert Parking.on(torch.device("cuda"), needed=needed).limit == limit


def test_what_is_parked_gives_its_memory_back_and_gets_its_content_back():
    parking = Parking(limit=100)
    small, large, view = torch.arange(8.0), torch.arange(40.0), None
    view = large[10:]
    parking.enter(0, ((small,), {}))
    parking.enter(1, ((large, None), {"pair": [view, "text"]}))
    assert small.untyped_storage().nbytes() == 32  # there was room
    assert large.untyped_storage().nbytes() == 0
    parking.leave(1)
    assert torch.equal(large, torch.arange(40.0))
    assert torch.equal(view, torch.arange(10.0, 40.0))
    parking.leave(0)
    parking.enter(1, ((large[:1],), {}))  # 160 bytes of storage, however little of it is seen
    assert large.untyped_storage().nbytes() == 0


def test_the_models_own_buffers_stay():
    buffer = torch.ones(10)
    parking = Parking(0, shared=[buffer])
    parking.enter(0, ((buffer,), {}))
    assert torch.equal(buffer, torch.ones(10))


def test_a_blocks_parameters_stay_as_long_as_it_is_there(tmp_path):
    """A Linear may read one, as a learned memory's does."""
    parking, weight = Parking(float("inf"), directory=tmp_path), nn.Parameter(torch.ones(10))
    with parking.keeping([weight]):
        parking.enter(0, ((weight,), {}), weight, inside=True)
        assert weight.untyped_storage().nbytes() == 40
        parking.leave(0)
    parking.enter(0, ((row := torch.ones(10),), {}), row, inside=True)
    assert row.untyped_storage().nbytes() == 0


def test_a_tensor_of_another_row_is_refused(tmp_path):
    """Where a model keeps what it has computed for one row, its bytes are away while that row waits."""
    parking, shared = Parking(float("inf"), directory=tmp_path), torch.ones(10)
    parking.enter(0, ((shared,), {}), shared, inside=True)
    with pytest.raises(EmlocError, match="Two rows share a tensor"):
        parking.enter(1, ((shared,), {}), shared, inside=True)


def test_inside_a_block_hidden_states_go_to_a_file(tmp_path):
    parking = Parking(float("inf"), directory=tmp_path)
    inputs, inner, mask = torch.arange(40.0), torch.arange(90.0), torch.ones(10)
    view = inner[10:]
    parking.enter(0, ((inputs,), {"mask": mask}), inputs)
    assert inputs.untyped_storage().nbytes() == 160
    parking.leave(0)
    parking.enter(0, ((inner,), {"mask": mask}), inner, inside=True)
    assert [t.untyped_storage().nbytes() for t in (inputs, inner, mask)] == [0, 0, 40]  # the mask may be shared
    parking.leave(0)
    assert torch.equal(inputs, torch.arange(40.0))
    assert torch.equal(view, torch.arange(10.0, 90.0))
    assert not list(tmp_path.iterdir())  # a file without a name


def test_queries_keys_and_values_of_rows_that_wait_behind_attention_go_to_the_file(tiny_model, tmp_path):
    skeleton = OpenModel(Checkpoint(tiny_model), LLAMA).skeleton
    ids = torch.randint(3, 128, (1, 17), generator=torch.Generator().manual_seed(0))
    attended, sizes = [], []
    stream = Stream(skeleton, Parking(float("inf"), skeleton.model.buffers(), tmp_path))
    know = stream.parking.know
    stream.parking.know = lambda sample, *hidden: (know(sample, *hidden), attended.extend(map(weakref.ref, hidden)))

    @contextmanager
    def visit(unit):
        o_proj = skeleton.model.get_submodule(f"{unit}.self_attn.o_proj")
        hook = o_proj.register_forward_pre_hook(lambda _, args: stream.pause("o_proj", args, inside=True))
        assert stream.step(0) == "o_proj"
        alive = [t for ref in attended if (t := ref()) is not None]
        sizes.append([t.untyped_storage().nbytes() for t in alive])
        hook.remove()
        stream.step(0)
        yield

    expected = Stream(skeleton).run([lambda: skeleton.model(input_ids=ids, use_cache=False).logits])
    visiting = lambda unit: visit(unit) if unit in skeleton.blocks else None  # noqa: E731
    (logits,) = stream.run([lambda: skeleton.model(input_ids=ids, use_cache=False).logits], visiting)
    assert torch.equal(logits, expected[0])
    assert all(len(alive) >= 4 and not any(alive) for alive in sizes)  # those three, and what o_proj is called with


def test_logits_are_the_same_when_nothing_may_stay(tiny_model):
    skeleton = OpenModel(Checkpoint(tiny_model), LLAMA).skeleton
    rows = [torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(length)) for length in (5, 17)]
    forwards = [lambda ids=ids: skeleton.model(input_ids=ids, use_cache=False).logits for ids in rows]
    parking = Parking(0, skeleton.model.buffers())
    moved = Stream(skeleton, parking).run(forwards)
    kept = Stream(skeleton).run(forwards)
    assert all(torch.equal(one, other) for one, other in zip(moved, kept, strict=True))


@pytest.mark.parametrize("calibration", ["base", "propagated"])
def test_an_emulator_is_the_same_when_nothing_may_stay(tiny_model, rows_file, tmp_path, monkeypatch, calibration):
    settings = CompressSettings(samples=4, selection=2, calibration=calibration)
    rows = load_rows(str(rows_file))
    kept = compress_job(tiny_model, rows, tmp_path / "kept", settings).run()
    monkeypatch.setattr(Parking, "on", classmethod(lambda cls, _device, shared, _directory, **_needed: cls(0, shared)))
    moved = compress_job(tiny_model, rows, tmp_path / "moved", settings).run()
    shards = sorted(path.name for path in kept.glob("*.safetensors"))
    assert len(shards) == 6
    for name in shards:
        assert (kept / name).read_bytes() == (moved / name).read_bytes()


def test_an_interrupted_run_does_not_go_on_with_another_kind_of_device(tiny_model, rows_file, tmp_path):
    job = compress_job(tiny_model, rows_file, tmp_path / "emulator", CompressSettings())

    def interrupt(_block, done, _total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(interrupt)
    request = tmp_path / ".emulator.partial" / "request.json"
    request.write_text(request.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(EmlocError, match='device was "cuda" and is now "cpu"'):
        job.run()


def test_the_next_block_is_read_ahead(tiny_model):
    skeleton = OpenModel(Checkpoint(tiny_model), LLAMA).skeleton
    futures = []
    submit = skeleton._reader.submit
    skeleton._reader.submit = lambda *read: futures.append(submit(*read))
    ids = torch.tensor([[5, 6, 7]])
    stream = Stream(skeleton)
    stream.run([lambda: skeleton.model(input_ids=ids, use_cache=False)])
    sizes = [sum(p.numel() * 4 for p in skeleton.model.get_submodule(unit).parameters()) for unit in stream.units[1:]]
    assert [future.result() for future in futures] == sizes


def test_a_copy_of_what_is_not_loaded_names_the_same_device():
    gpu = torch.device("cuda", 1)
    copied = copy.deepcopy(Absent.like(torch.ones(2, 3, dtype=torch.bfloat16), gpu))
    assert (copied.device, copied.shape, copied.dtype) == (gpu, (2, 3), torch.bfloat16)
    assert copied.is_meta
