"""Units in pinned memory, here in ordinary memory: a GPU is needed to pin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc_core.model import pinned
from emloc_core.model.pinned import PinnedMemory

TENSORS = st.dictionaries(
    st.text("abc", min_size=1),
    st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.uint8])),
    max_size=4,
)


@pytest.fixture(autouse=True)
def unpinned(monkeypatch):
    sizes = []

    def buffer(nbytes):
        sizes.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(pinned, "_buffer", buffer)
    return sizes


@settings(max_examples=50, deadline=None)
@given(units=st.lists(TENSORS, min_size=1, max_size=5), room=st.integers(0, 4096), seed=st.integers(0, 99))
def test_units_are_as_they_were_read_and_read_once_where_there_is_room(units, room, seed):
    torch.manual_seed(seed)
    files = [{name: torch.randn(shape).mul(50).to(dtype) for name, (shape, dtype) in unit.items()} for unit in units]
    memory, reads, kept = PinnedMemory(room), [], set()
    for index in [*range(len(files)), *range(len(files))]:
        before = len(reads)
        unit = memory.unit(str(index), lambda index=index: reads.append(index) or files[index])
        tensors = unit.places.tensors(unit.memory)
        assert tensors.keys() == files[index].keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in files[index].items())
        assert all(
            tensors[name].data_ptr() % 512 == unit.memory.data_ptr() % 512 for name in tensors if tensors[name].numel()
        )
        if len(reads) == before:
            kept.add(index)
    sizes = {index: PinnedMemory(1 << 40).unit("", lambda index=index: files[index]).memory.nbytes for index in kept}
    assert sum(sizes.values()) <= room


def test_units_without_room_pass_through_one_buffer(unpinned):
    files = {name: {"weight": torch.full((64, 64), float(value))} for value, name in enumerate("abc")}
    memory = PinnedMemory(files["a"]["weight"].nbytes)
    for name in "abcabc":
        assert memory.unit(name, lambda name=name: files[name]).memory.view(torch.float32)[0] == "abc".index(name)
    assert len(unpinned) == 2  # of the one that stays, and of all others


def test_the_room_of_a_unit_that_leaves_is_another_ones():
    files = {name: {"weight": torch.full((64, 64), float(value))} for value, name in enumerate("ab")}
    memory, reads = PinnedMemory(files["a"]["weight"].nbytes), []
    memory.unit("a", lambda: files["a"])
    memory.leave("a")
    memory.leave("a")
    for _ in range(2):
        memory.unit("b", lambda: reads.append("b") or files["b"])
    assert reads == ["b"]
