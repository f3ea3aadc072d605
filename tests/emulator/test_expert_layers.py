"""Stand-ins for stacks of experts, on every layout that transformers has: they compute what their dense module does."""

from types import SimpleNamespace

import pytest
import torch
from support.marks import most_thorough
from torch import nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from emloc_core.algorithms.statistics import Gram
from emloc_core.standins import (
    NF4,
    FourBitLowRank,
    LowRank,
    Trellis,
    TwoBitLowRank,
    layer,
)
from emloc_core.standins.experts import StandInExperts, computes_as_experts, matrices, stacks

EXPERTS, HIDDEN, INNER = 5, 64, 40
FORMATS = (NF4().own(), Trellis(), FourBitLowRank(), TwoBitLowRank(), LowRank())
#: Those that take little time to fit.
QUICK = [format for format in FORMATS if format.name in ("nf4", "trellis", "low-rank")]
LAYOUTS = {
    "usual": (Qwen3MoeExperts, {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "hidden_act": "silu"}),
    "transposed": (AriaExperts, {"moe_num_experts": EXPERTS, "intermediate_size": INNER}),
    "biases": (  # and an interleaved, clamped gate
        GptOssExperts,
        {"num_local_experts": EXPERTS, "intermediate_size": INNER, "swiglu_alpha": 1.7, "swiglu_limit": 1.5},
    ),
    "norm": (
        MuseSparkExperts,
        {"num_local_experts": EXPERTS, "moe_hidden_size": HIDDEN, "moe_intermediate_size": INNER,
         "hidden_act": "silu", "post_norm_eps": 1e-6},
    ),
    "no gate": (
        NemotronHExperts,
        {"n_routed_experts": EXPERTS, "moe_latent_size": None, "moe_intermediate_size": INNER,
         "mlp_hidden_act": "relu2"},
    ),
}  # fmt: skip
BY_NAME = {"ids": lambda format: format.name}


def experts_of(layout):
    kind, fields = LAYOUTS[layout]
    experts = kind(SimpleNamespace(hidden_size=HIDDEN, _experts_implementation="grouped_mm", **fields))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    return experts.requires_grad_(requires_grad=False)


def tokens(used=EXPERTS):
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(30, HIDDEN, generator=draw).requires_grad_()
    index = torch.stack([torch.randperm(used, generator=draw)[:2] for _ in range(30)])
    return hidden, index, torch.rand(30, 2, generator=draw)


def rounded(matrix, format):
    """Return the parts of a matrix, fitted to inputs that favour no direction."""
    gram = Gram("input", matrix.shape[1])
    gram.add(torch.eye(matrix.shape[1]))
    (fitted,) = format.fit([matrix], gram, [16 if format.ratios else None])
    return format.pack(fitted, torch.float32)


def packed(experts, format):
    """Return stand-ins for both stacks of the experts, which are given up."""
    fitted = {name: [rounded(matrix, format) for matrix in matrices(experts, name).clone()] for name in stacks(experts)}
    stand_in = StandInExperts(experts, format.layer, dict.fromkeys(fitted, 16 if format.ratios else None))
    for name, parts in fitted.items():
        for key in format.names():
            stand_in.get_parameter(f"{key}.{name}").copy_(torch.stack([matrix[key] for matrix in parts]))
    return stand_in


def outputs(module, hidden, index, weights):
    output = module(hidden, index, weights)
    towards = torch.linspace(-1, 1, output.numel()).view_as(output)
    return output, *torch.autograd.grad((output * towards).sum(), hidden)


@pytest.mark.parametrize(
    ("layout", "format"),
    [
        pytest.param(layout, format, id=f"{layout}-{format.name}", marks=marks)
        for layout in LAYOUTS
        for format in FORMATS
        for marks in [() if layout == "transposed" or format in QUICK else pytest.mark.thorough]
    ],
)
def test_outputs_and_gradients_are_those_of_the_dense_experts(layout, format):
    stand_in = packed(experts_of(layout), format)
    actual, expected = outputs(stand_in, *tokens()), outputs(stand_in.dense(), *tokens())
    for one, other in zip(actual, expected, strict=True):
        if format.layer is LowRank.layer:  # two products instead of one
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(one, other)
    actual, base = actual[0].detach(), experts_of(layout)(*tokens()).detach()
    assert 1e-3 < float((actual - base).norm() / base.norm()) < 1.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stacks_at_full_precision_are_the_base(layout):
    experts = experts_of(layout)
    up, down = stacks(experts)
    kept = experts.get_parameter(up)
    stand_in = StandInExperts(experts, LowRank.layer, {down: INNER})
    assert stand_in.get_parameter(up) is kept
    u, s, v = torch.linalg.svd(matrices(experts_of(layout), down), full_matrices=False)
    stand_in.get_parameter(f"weight.{down}").copy_(u * s[:, None])
    stand_in.get_parameter(f"V.{down}").copy_(v)
    for one, other in zip(outputs(stand_in, *tokens()), outputs(experts_of(layout), *tokens()), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS, **BY_NAME)
def test_few_experts_at_a_time_give_the_same_bits(format, monkeypatch):
    stand_in = packed(experts_of("usual"), format)
    expected = outputs(stand_in, *tokens())
    monkeypatch.setattr(layer, "_UNPACKED", 2 * 4 * 2 * INNER * HIDDEN)  # two of the first stack, four of the second
    for one, other in zip(outputs(stand_in, *tokens()), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("format", "waits"), [(Trellis(), 1), (LowRank(), 0)], ids=["trellis", "low-rank"])
def test_which_experts_have_tokens_is_asked_once_for_all_products(format, waits, monkeypatch):
    stand_in, calls, tolist = packed(experts_of("usual"), format), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: calls.append(1) or tolist(tensor))
    outputs(stand_in, *tokens())  # two products forward, two backward
    assert len(calls) == waits


def test_experts_without_tokens_are_not_unpacked(monkeypatch):
    stand_in, seen = packed(experts_of("usual"), Trellis()), []
    unpack = stand_in.layer.unpack_stack

    def watched(*parts, **options):
        seen.append(len(parts[0]))
        return unpack(*parts, **options)

    monkeypatch.setattr(stand_in.layer, "unpack_stack", watched)
    outputs(stand_in, *tokens(used=2))
    assert seen == [2] * 4  # of both stacks, forward and backward
    assert stand_in(*(part[:0] for part in tokens())).shape == (0, HIDDEN)


@pytest.mark.parametrize("format", FORMATS, **BY_NAME)
@pytest.mark.parametrize(("m", "n"), most_thorough([(48, 64), (17, 33), (128, 256)], (48, 64), (17, 33)))
def test_a_stack_is_unpacked_as_its_matrices(format, m, n):
    draw = torch.Generator().manual_seed(0)
    packed_matrices = [rounded(torch.randn(m, n, generator=draw), format) for _ in range(3)]
    stack = [torch.stack([parts[name] for parts in packed_matrices]) for name in format.names()]
    for dtype in (torch.float32, torch.bfloat16):
        unpacked = format.layer.unpack_stack(*stack, shape=(m, n), dtype=dtype)
        for matrix, parts in zip(unpacked, packed_matrices, strict=True):
            assert torch.equal(matrix, format.layer.unpack(*parts.values(), shape=(m, n), dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_known_by_what_they_compute(layout):
    experts, inputs = experts_of(layout), tuple(part.detach() for part in tokens())
    output = experts(*inputs)
    assert computes_as_experts(experts, inputs, output)
    assert not computes_as_experts(experts, inputs, output + 0.01)
    del experts.has_bias  # as in a class that transformers does not mark
    assert not computes_as_experts(experts, inputs, output)


def test_a_module_without_marks_is_none():
    bare = nn.Module()
    bare.gate_up_proj, bare.down_proj = (nn.Parameter(torch.zeros(EXPERTS, HIDDEN, HIDDEN)) for _ in "ab")
    assert not computes_as_experts(bare, tokens(), torch.zeros(30, HIDDEN))


def test_experts_in_fp16_compute_under_autocast_to_bfloat16(monkeypatch):
    monkeypatch.setattr(layer, "_UNPACKED", 1)  # one expert at a time
    stand_in, (hidden, *where) = packed(experts_of("usual").half(), Trellis()), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        output = stand_in(hidden.half(), *where)
    expected, slope = outputs(stand_in, hidden.half().detach().requires_grad_(), *where)
    assert float((output - expected).norm()) < 0.05 * float(expected.norm())
    towards = torch.linspace(-1, 1, output.numel()).view_as(output)
    (gradient,) = torch.autograd.grad((output * towards).sum(), hidden)
    assert float((gradient - slope).norm()) < 0.05 * float(slope.norm())
