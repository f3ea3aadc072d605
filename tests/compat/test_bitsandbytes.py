"""What is needed of bitsandbytes: nothing private, but a layout and a registration that no page promises."""

import json

import pytest
import torch
from bitsandbytes import functional, matmul_4bit, nn
from support.contracts import contract


@contract("bitsandbytes", "standins.nf4")
def test_a_packed_weight_is_codes_scales_and_a_note():
    weight = torch.randn(32, 64)
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    shapes = {name: tuple(part.shape) for name, part in state.as_dict(packed=True).items() if "__" not in name}
    expected = {"absmax": (32,), "quant_map": (16,), "nested_absmax": (1,), "nested_quant_map": (256,)}
    assert shapes == expected, f"a packed weight has the parts {shapes}"
    assert (codes.shape, codes.dtype) == ((1024, 1), torch.uint8), f"codes are {codes.shape} of {codes.dtype}"
    note = json.loads(bytes(state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"].tolist()))
    fields = {name: note.get(name) for name in ("quant_type", "blocksize", "nested_blocksize", "shape")}
    assert fields == {"quant_type": "nf4", "blocksize": 64, "nested_blocksize": 256, "shape": [32, 64]}, (
        f"it says {fields}"
    )
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    levels = state.code[torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).long()].reshape(-1, 64)
    assert torch.allclose(levels * scales[:, None], functional.dequantize_4bit(codes, state).reshape(-1, 64)), (
        "numbers are not levels times scales, the first of two in the high bits"
    )


@contract("bitsandbytes", "standins.nf4")
def test_a_weight_is_read_from_its_parts():
    weight = torch.randn(32, 64)
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    again = functional.QuantState.from_dict(state.as_dict(packed=True), device=codes.device)
    same = torch.equal(functional.dequantize_4bit(codes, again), functional.dequantize_4bit(codes, state))
    assert same, "QuantState.from_dict gives another state"


@pytest.mark.parametrize("width", [16, 80, 96, 100, 4304])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@contract("bitsandbytes", "compat.bitsandbytes")
def test_rows_may_begin_within_a_block_of_numbers_that_share_a_scale(width, dtype):
    weight, x = torch.randn(24, width).to(dtype), torch.randn(3, width).to(dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    scales = (functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).repeat_interleave(64)
    levels = state.code[torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).long()].flatten()
    expected = (levels * scales[: len(levels)]).view(24, width).to(dtype)
    assert torch.allclose(functional.dequantize_4bit(codes, state), expected, rtol=0.01), (
        f"rows of {width} numbers are unpacked with the scales of others"
    )
    product, right = matmul_4bit(x, codes, state).float(), (x @ expected.T).float()
    assert float((product - right).norm()) < 0.02 * float(right.norm()), "products are not with what is unpacked"


@pytest.mark.parametrize("width", [64, 96])
@contract("bitsandbytes", "compat.bitsandbytes")
def test_a_layer_is_trained_after_an_evaluation_as_before(width):
    layer = nn.Linear4bit(width, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = nn.Params4bit(torch.randn(64, width), requires_grad=False, quant_type="nf4")
    layer, x = layer.to("cpu"), torch.randn(3, width, dtype=torch.bfloat16, requires_grad=True)
    before = torch.autograd.grad(layer.train()(x).sum(), x)[0]
    with torch.no_grad():
        layer.eval()(x.detach())
    after = torch.autograd.grad(layer.train()(x).sum(), x, allow_unused=True)[0]
    assert after is not None, "no gradient passes through a layer that was evaluated"
    assert torch.equal(before, after), "an evaluation changes the gradient through a layer"
