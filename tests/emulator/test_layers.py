"""The layers of stand-ins, in every kind whose format is our own: what they compute, and which parts they miss."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.jobs import compress_job
from support.layers import FORMATS, M, N, layer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from transformers import AutoModelForCausalLM

import emloc_core.standins.quantizer  # noqa: F401  registers the emulator's loader
from emloc_core.errors import EmlocError
from emloc_core.settings import CompressSettings
from emloc_core.standins import nf4, unpacking
from emloc_core.standins.registry import format_named

KINDS = ("low-rank", "low-rank-nf4", "low-rank-2-bit", "trellis")


@pytest.fixture(scope="module", params=KINDS)
def compressed(request, tiny_model, rows_file, tmp_path_factory):
    """A kind, and its emulator."""
    settings = CompressSettings(kind=request.param, samples=4, selection=2)
    emulator = compress_job(tiny_model, rows_file, tmp_path_factory.mktemp("made") / "emulator", settings).run()
    return format_named(request.param), emulator


def test_a_layer_computes_what_the_dense_one_does(compressed):
    kind, emulator = compressed
    model = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto")
    layer = model.model.layers[0].mlp.down_proj
    shape, size = (layer.out_features, layer.in_features), layer.rank
    assert sum(part.nbytes for part in layer.parameters()) == kind.nbytes(shape, size, torch.float32)
    x = torch.randn(5, layer.in_features, requires_grad=True)
    output, weights = layer(x), torch.randn(5, layer.out_features)
    (gradient,) = torch.autograd.grad((output * weights).sum(), x)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(ids).logits
        dense = model.dequantize()
        dense_layer = dense.model.layers[0].mlp.down_proj
        assert type(dense_layer) is torch.nn.Linear
        assert torch.allclose(output, functional.linear(x, dense_layer.weight), atol=1e-5)
        assert torch.allclose(gradient, weights @ dense_layer.weight, atol=1e-5)
        assert torch.allclose(dense(ids).logits, before, atol=1e-4)


def test_every_part_that_is_missing_is_found(compressed):
    kind, emulator = compressed
    index_file = emulator / "model.safetensors.index.json"
    complete = json.loads(index_file.read_text())
    for key in kind.keys("model.layers.0.mlp.up_proj.weight"):
        index = {**complete, "weight_map": dict(complete["weight_map"])}
        shard = emulator / index["weight_map"].pop(key)
        kept = shard.read_bytes()
        save_file({name: tensor for name, tensor in load_file(shard).items() if name != key}, shard, {"format": "pt"})
        index_file.write_text(json.dumps(index))
        with pytest.raises(EmlocError, match=rf"lacks {key}"):
            AutoModelForCausalLM.from_pretrained(emulator, dtype="auto")
        shard.write_bytes(kept)
    index_file.write_text(json.dumps(complete))


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_compiled_layers_are_one_graph(format, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")  # which is set for all other tests
    layers = nn.Sequential(layer(format, torch.float32), nn.Linear(M, N), layer(format, torch.float32))
    graphs = CompileCounterWithBackend("aot_eager")
    inputs = [torch.randn(3, N, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    with torch._dynamo.config.patch(disable=False):
        compiled = torch.compile(layers, fullgraph=True, backend=graphs)
        outputs = [model(x) for model, x in zip((layers, compiled), inputs, strict=True)]
    assert graphs.frame_count == 1
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(*(x.grad for x in inputs))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_whether_a_device_has_kernels_is_a_constant_of_graphs(device, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    with torch._dynamo.config.patch(disable=False):
        added = torch.compile(lambda x: x + unpacking.compiles_for(device), fullgraph=True, backend="eager")
        assert added(torch.zeros(())) == unpacking.compiles_for(device)


def test_levels_of_scales_are_the_same_whatever_dtype_a_model_is_built_in():
    expected = nf4.scale_levels(torch.device("cpu"))
    nf4.scale_levels.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        scale_levels = nf4.scale_levels(torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert scale_levels.dtype == torch.float32
    assert torch.equal(scale_levels, expected)
