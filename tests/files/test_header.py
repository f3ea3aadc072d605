"""Headers of safetensors files: damaged ones are refused, and all others are read as by the library."""

import json

import pytest
import safetensors
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from emloc_core.errors import EmlocError
from emloc_core.files.header import read_header
from emloc_core.files.shards import DTYPES

GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "F16", "shape": [3], "data_offsets": [16, 22]}}  # fmt: skip
DATA = bytes(range(22))


def as_file(header, data=DATA, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def but(name="a", **fields):
    return as_file({**GOOD, name: {**GOOD["a"], **fields}})


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [16, 16]}
#: What is wrong -> the file.
DAMAGED = {
    "is a list": as_file(b"[]", b""),
    "is no UTF-8": as_file(b'{"\xff": 1}', b""),
    "is nested too deeply": as_file(b'{"a":' * 100_000, b""),
    "a key twice": as_file(json.dumps(GOOD).replace('"b"', '"a"').encode()),
    "the same field twice": as_file(json.dumps(GOOD).replace('"shape": [3]', '"shape": [3], "shape": [3]').encode()),
    "metadata that is no object": as_file({"__metadata__": [], **GOOD}),
    "metadata that is no string": as_file({"__metadata__": {"step": 3}, **GOOD}),
    "an entry that is no object": as_file({"a": 3}, b""),
    "an entry that is a list": as_file({**GOOD, "a": ["F32", [2, 2], [0, 16]]}),
    "an entry without offsets": as_file({"a": {"dtype": "F32", "shape": [0]}}, b""),
    "a dtype that is unknown": but(dtype="F31"),
    "a dtype that is a list": but(dtype=["F32"]),
    "a dtype that is an object": but(dtype={"F32": None}),
    "a negative shape": but(shape=[-2, -2]),
    "a shape of floats": but(shape=[2.0, 2]),
    "a shape of booleans": but(shape=[True, 4]),
    "a shape that is a number": but(shape=4),
    "a shape that overflows": but(shape=[1 << 63, 1 << 63, 0], data_offsets=[0, 0]),
    "a shape of another size": but(shape=[2, 3]),
    "a dtype of another size": but(dtype="F64"),
    "offsets that are negative": but(data_offsets=[-16, 0]),
    "offsets that are backwards": but(data_offsets=[16, 0]),
    "offsets that are floats": but(data_offsets=[0.0, 16.0]),
    "three offsets": but(data_offsets=[0, 16, 16]),
    "offsets past every bound": but(data_offsets=[1 << 70, (1 << 70) + 16]),
    "tensors that overlap": as_file({**GOOD, "b": {**GOOD["b"], "data_offsets": [8, 14]}}, DATA[:16]),
    "the same bytes twice": as_file({**GOOD, "b": GOOD["a"]}, DATA[:16]),
    "a hole": as_file({**GOOD, "b": {**GOOD["b"], "data_offsets": [20, 26]}}, bytes(26)),
    "a hole at the beginning": but(data_offsets=[4, 20]),
    "an empty tensor in another": as_file({"c": {**EMPTY, "data_offsets": [8, 8]}, **GOOD}),
    "data that is cut short": as_file(GOOD, DATA[:-1]),
    "data beyond the end": as_file(GOOD, DATA + b"\0"),
    "a length past the end": as_file(GOOD, b"", length=4000),
    "a length past every bound": as_file(GOOD, length=(1 << 64) - 1),
    "no length": b"\x01\0",
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
@pytest.mark.usefixtures("uncollected")
def test_a_damaged_header_is_refused(tmp_path, fault):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[fault])
    with pytest.raises(EmlocError, match=r"model\.safetensors .*(Download or copy the file again)") as refused:
        read_header(path)
    assert len(str(refused.value)) < 1000


def test_what_is_allowed_is_read(tmp_path):
    header = {
        "__metadata__": None,
        "empty": EMPTY,
        **GOOD,
        "scalar": {"dtype": "U8", "shape": [], "data_offsets": [22, 23]},
    }
    (tmp_path / "x.safetensors").write_bytes(as_file(json.dumps(header).encode() + b"   ", DATA + b"\7"))
    tensors, metadata = read_header(tmp_path / "x.safetensors")
    assert list(tensors) == ["a", "empty", "b", "scalar"]
    assert metadata == {}
    assert [tensor.nbytes for tensor in tensors.values()] == [16, 0, 6, 1]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_every_dtype_is_that_of_the_library(tmp_path, dtype):
    content = save({"a": torch.zeros(3).to(dtype)})
    (tmp_path / "x.safetensors").write_bytes(content)
    tensors, _ = read_header(tmp_path / "x.safetensors")
    assert DTYPES[tensors["a"].dtype] == dtype
    assert tensors["a"].is_floating_point == dtype.is_floating_point
    assert load(content)["a"].dtype == dtype


SIZES = st.integers(-1, 9) | st.sampled_from([1 << 31, 1 << 63, 1 << 64]) | st.floats(0, 4) | st.booleans() | st.none()
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8", "BOOL", "F4", "f32", ""]) | st.none(),
        "shape": st.lists(SIZES, max_size=3) | SIZES,
        "data_offsets": st.lists(SIZES, min_size=1, max_size=3) | st.tuples(st.just(0), st.integers(0, 16)),
    },
    optional={"more": st.integers()},
)
HEADER = st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), ENTRY | st.none(), max_size=3)


def read(path):
    try:
        return read_header(path)[0]
    except EmlocError:
        return None


@settings(max_examples=300, deadline=None)
@given(header=HEADER, data=st.integers(0, 16))
@example(header=GOOD, data=22)
def test_nothing_is_read_that_the_library_refuses(tmp_path_factory, header, data):
    content = as_file(header, bytes(data))
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    tensors = read(path)
    if tensors is not None:
        library = dict(safetensors.deserialize(content))
        assert {key: list(tensor.shape) for key, tensor in tensors.items()} == {
            key: entry["shape"] for key, entry in library.items()
        }
        assert [content[tensor.start : tensor.stop] for tensor in tensors.values()] == [
            library[key]["data"] for key in tensors
        ]
