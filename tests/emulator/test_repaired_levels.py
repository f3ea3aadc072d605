"""Weights on three levels with a repair in four bits: what each makes up for, how they are stored, what is refused."""

import json
from itertools import pairwise

import pytest
import torch
from support.jobs import compress_job
from support.marks import most_thorough
from transformers import AutoModelForCausalLM

import emloc_core.standins.quantizer  # noqa: F401  registers the emulator's loader
from emloc_core.algorithms import levels
from emloc_core.algorithms.factorize import output_error
from emloc_core.algorithms.feedback import damped
from emloc_core.algorithms.statistics import Gram
from emloc_core.emulator import propagation
from emloc_core.errors import EmlocError
from emloc_core.settings import CompressSettings
from emloc_core.standins import NF4, RepairedThreeLevels, repaired
from emloc_core.standins.levels import pack, unpack

KIND = RepairedThreeLevels()


def compression(model, rows, output, **chosen):
    sets = CompressSettings(**{"kind": KIND.name, "ratio": 0.3, "samples": 4, "selection": 2, **chosen})
    return compress_job(model, rows, output, sets)


def drawn(m, n, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    gram = Gram("input", n)
    gram.add(torch.randn(tokens, n, generator=generator) * torch.logspace(0, -2, n))
    return torch.randn(m, n, generator=generator), gram


def on_levels(weight, gram):
    packed = pack(levels.rounded(weight, damped(gram, 0.1), 3))
    return unpack(*packed.values(), torch.float32, tuple(weight.shape), 3)


@pytest.mark.parametrize("seed", most_thorough(range(4), 0))
@pytest.mark.parametrize(("m", "n"), [(96, 70), (64, 130)])
def test_the_error_falls_with_the_rank_and_with_every_round(m, n, seed, monkeypatch):
    weight, gram = drawn(m, n, 200, seed)
    errors = [output_error(weight, on_levels(weight, gram), gram.matrix)]
    errors += [KIND.fit([weight], gram, [rank])[0].relative_error() for rank in (2, 8, 32)]
    assert all(after < before for before, after in pairwise(errors))
    monkeypatch.setattr(repaired, "_ROUNDS", 1)
    assert KIND.fit([weight], gram, [8])[0].relative_error() > errors[2]


def test_it_is_better_than_a_repair_of_the_weight_as_it_is_rounded_alone():
    weight, gram = drawn(96, 70, 200, 0)
    lost = (weight - on_levels(weight, gram)).double() @ torch.linalg.cholesky(gram.matrix.double())
    least = float(torch.linalg.svdvals(lost)[8:].norm())  # of any repair of that rank, in fp64
    least /= float((weight.double() @ torch.linalg.cholesky(gram.matrix.double())).norm())
    assert KIND.fit([weight], gram, [8])[0].relative_error() < least


@pytest.mark.parametrize("shape", [(96, 33), (17, 130), (5, 3)])
def test_what_is_stored_is_what_was_fitted(shape):
    weight, gram = drawn(*shape, 200, 0)
    fitted = KIND.fit([weight], gram, [2])[0]
    packed = KIND.pack(fitted, torch.float32)
    assert list(packed) == KIND.keys("weight")
    assert sum(part.nbytes for part in packed.values()) == KIND.nbytes(shape, 2, torch.float32)
    read = KIND.read(list(packed.values()), shape, torch.float32).weight()
    assert fitted.relative_error() == pytest.approx(output_error(weight, read, gram.matrix), abs=1e-6)


def test_many_tokens_take_one_product_and_get_what_few_get():
    weight, gram = drawn(48, 32, 200, 0)
    stored = KIND.pack(KIND.fit([weight], gram, [4])[0], torch.float32)
    layer = KIND.layer(32, 48, rank=4, bias=False, dtype=torch.float32)
    layer.load_state_dict(stored)
    many = torch.randn(20, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)  # 48 * 32 / 80 = 19.2
    few = many.detach()[:10].requires_grad_()
    outputs, with_one = layer(few), layer(many)
    assert torch.equal(with_one, torch.nn.functional.linear(many, layer.unpacked()))
    assert not torch.equal(with_one[:10], outputs)
    torch.testing.assert_close(with_one[:10], outputs)
    outputs.sum().backward()
    with_one.sum().backward()
    torch.testing.assert_close(many.grad[:10], few.grad)


def test_linears_of_a_block_are_fitted_to_those_before_them_with_their_repairs(
    tiny_model, rows_file, tmp_path, monkeypatch
):
    blocks, emulating = [], propagation.emulating

    def watched(stream, modules, stand_ins, rows):
        blocks.append(stand_ins)
        return emulating(stream, modules, stand_ins, rows)

    monkeypatch.setattr(propagation, "emulating", watched)
    job = compression(tiny_model, rows_file, tmp_path / "emulator")
    model = AutoModelForCausalLM.from_pretrained(job.run(), dtype="auto")
    seen = {path: stand_in for stand_ins in blocks for path, stand_in in stand_ins.items()}
    assert len(seen) == 3 * 7
    for path, stand_in in seen.items():
        assert torch.allclose(stand_in.weight(), model.get_submodule(path).unpacked(), atol=1e-6)


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ({"ratio": 0.6}, "hardly smaller than weights in four bits"),
        ({"calibration": "none"}, "is always fitted to rows"),
        ({"allocator": "global"}, "gives all Linears the same ratio"),
        ({"refine": 1}, "cannot be refined"),
    ],
)
def test_what_is_refused(tiny_model, rows_file, tmp_path, chosen, complaint):
    with pytest.raises(EmlocError, match=complaint):
        compression(tiny_model, rows_file, tmp_path / "emulator", **chosen)


def test_the_largest_is_smaller_than_weights_in_four_bits():
    for m, n in ((576, 576), (4096, 1024), (3072, 8192)):
        rank = int(KIND.ratios.largest * m * n / (m + n))
        assert KIND.nbytes((m, n), rank, torch.bfloat16) < NF4().nbytes((m, n), 0, torch.bfloat16)


def test_a_plan_looks_for_no_smaller_repair(shallow_model, emloc):
    code, out, _ = emloc("plan", shallow_model, "--kind", KIND.name, "--memory", "1MB", "--length", 16, "--json")
    planned = json.loads(out)
    assert (code, planned["ratio"], planned["fits"]) == (1, 0.2, False)
