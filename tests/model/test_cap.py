"""What a process may take: of a GPU by torch, of the memory of the CPU by the kernel, and the error beyond it."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from support.forkserver import warm_process

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json, write_json
from emloc_core.model.cap import CAP, gpu_cap, keep_to_cap
from emloc_core.model.device import free_of
from emloc_core.model.overhead import overhead
from emloc_core.settings import FREE
from emloc_core.stages.perform import finish

GIB = 1 << 30


@pytest.fixture
def gpus(monkeypatch):
    """Two cards of 80 GiB, of which others hold 50; a dict of the shares that torch may take."""
    shares, current = {0: 1.0, 1: 1.0}, [0]

    def take(share, gpu):
        shares[gpu], current[0] = share, gpu  # as torch does

    @contextmanager
    def device(gpu):
        before, current[0] = current[0], gpu
        yield
        current[0] = before

    for name, function in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda _: SimpleNamespace(total_memory=80 * GIB),
        "mem_get_info": lambda _: (30 * GIB, 80 * GIB),
        "current_device": lambda: current[0],
        "device": device,
        "memory_reserved": lambda _: 2 * GIB,
        "memory_allocated": lambda _: GIB,
        "set_per_process_memory_fraction": take,
        "get_per_process_memory_fraction": shares.get,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    return shares


def test_torch_may_take_of_every_gpu_what_the_context_leaves(gpus, monkeypatch):
    assert free_of(torch.device("cuda:0")) == 31 * GIB  # as others hold the rest, but for what torch keeps
    monkeypatch.setenv(CAP, "cuda=24GiB")
    keep_to_cap()
    room = 24 * GIB - overhead("cuda", tuning=True)
    assert gpus == {gpu: pytest.approx(room / (80 * GIB)) for gpu in (0, 1)}
    assert free_of(torch.device("cuda:0")) == pytest.approx(room - GIB, abs=1)
    assert torch.cuda.current_device() == 0
    monkeypatch.setenv(CAP, "cuda=200GiB")
    keep_to_cap()
    assert gpus == {0: 1.0, 1: 1.0}
    monkeypatch.setenv(CAP, "cuda=100MiB")
    with pytest.raises(EmlocError, match=r"A cap of 105 MB is less than the 629 MB that the process has") as caught:
        keep_to_cap()
    assert caught.value.code == "memory"


def test_a_gpu_without_a_number_is_the_current_one(gpus):
    gpus[0] = 0.25
    assert free_of(torch.device("cuda")) == free_of(torch.device("cuda:0")) == 19 * GIB


def test_of_launched_processes_each_caps_its_own_gpu(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(CAP, "cuda=24GiB")
    keep_to_cap()
    assert gpus[0] == 1.0 > gpus[1]


def test_a_cap_of_ones_own_comes_before_that_of_a_run(monkeypatch):
    assert gpu_cap("24GiB") == {CAP: "cuda=24GiB"}
    assert gpu_cap(FREE) == gpu_cap(None) == {}
    monkeypatch.setenv(CAP, "cpu=8GiB")
    assert gpu_cap("24GiB") == {CAP: "cpu=8GiB"}


def test_a_cap_says_of_what_it_is(monkeypatch):
    monkeypatch.setenv(CAP, "24GiB")
    with pytest.raises(EmlocError, match=r"EMLOC_MEMORY_CAP names no memory of '24GiB'\. Write it as"):
        keep_to_cap()
    monkeypatch.setenv(CAP, "cpu=100MiB")
    with pytest.raises(EmlocError, match=r"A cap of 105 MB is less than the .* that the process has before its work"):
        keep_to_cap()


def allocate(path, gib):
    """Perform a stage that takes so many GiB of the CPU's memory, where 2 are allowed; write the error."""
    import os

    def run(_):
        torch.empty(int(gib * GIB), dtype=torch.uint8)
        return path.parent

    os.environ[CAP] = "cpu=2GiB"
    try:
        finish("train", SimpleNamespace(run=run, is_main_process=False))
        write_json(path, {})
    except EmlocError as error:
        write_json(path, {"error": str(error), "code": error.code, "resumable": error.resumable})


@pytest.mark.parametrize("gib", [1, 3])
def test_what_is_beyond_the_cap_of_a_process_is_one_error(gib, tmp_path):
    process = warm_process(allocate, tmp_path / "told.json", gib)
    process.start()
    process.join()
    error = read_json(tmp_path / "told.json")
    assert bool(error) is (gib > 2)
    if error:
        assert (error["code"], error["resumable"]) == ("memory", True)
        assert "EMLOC_MEMORY_CAP is cpu=2GiB" in error["error"]
