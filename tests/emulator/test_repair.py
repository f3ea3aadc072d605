"""Weights in four bits with a repair: what it repairs, how it is stored, and what it cannot be combined with."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import emloc_core.lowrank  # noqa: F401  registers the emulator's loader
from emloc_core.algorithms.allocation import uniform
from emloc_core.algorithms.factorize import factorize, output_error
from emloc_core.algorithms.statistics import Gram
from emloc_core.data.rows import load_rows
from emloc_core.emulator.compress import Compress
from emloc_core.emulator.ranks import LinearPlan
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.output import read_manifest
from emloc_core.kinds import NF4, RepairedNF4
from emloc_core.memory.budget import largest_ratio
from emloc_core.model.hooks import tapped
from emloc_core.settings import CompressSettings

KIND = RepairedNF4()


def compression(model, rows, output, **chosen):
    sets = CompressSettings(**{"kind": KIND.name, "ratio": 0.1, "samples": 4, "selection": 2, **chosen})
    return Compress(Checkpoint(model), load_rows(str(rows)), output, sets)


def drawn(m, n, tokens, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator).to(dtype)
    gram = Gram("input", n)
    gram.add(torch.randn(tokens, n, generator=generator) * torch.logspace(0, -2, n))
    return weight, gram


def product(kind, tensors, weight):
    u, v = kind.unpack(list(tensors.values()), tuple(weight.shape), weight.dtype)
    return u.float() @ v.float()


def rounded_alone(weight, gram):
    return product(NF4(), NF4().pack("weight", NF4().rounding(factorize)(weight, gram, 0), weight.dtype), weight)


@settings(max_examples=8, deadline=None)
@given(m=st.integers(1, 10), n=st.integers(1, 20), tokens=st.integers(1, 60), seed=st.integers(0, 2**16))
@example(m=2, n=1, tokens=1, seed=0)
def test_the_error_falls_with_the_rank_and_is_below_that_of_rounding(m, n, tokens, seed):
    weight, gram = drawn(m, n, tokens, seed)
    errors = [output_error(weight, rounded_alone(weight, gram), gram.matrix)]
    for rank in range(1, min(m, n, tokens) + 1):
        found = KIND.rounding(factorize)(weight, gram, rank)
        errors.append(found.relative_error())
        assert found.relative_error() == pytest.approx(
            output_error(weight, product(KIND, KIND.pack("weight", found, weight.dtype), weight), gram.matrix), abs=1e-5
        )
    assert all(after <= before + 1e-5 for before, after in pairwise(errors))
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), [(96, 33), (17, 130)])
def test_the_weight_is_rounded_as_without_a_repair_which_is_the_best_one(m, n, dtype):
    weight, gram = drawn(m, n, 200, 0, dtype)
    found = KIND.rounding(factorize)(weight, gram, 9)
    codes, scales, ranges, *_ = KIND.pack("weight", found, dtype).values()
    nothing = [codes, scales, ranges, torch.zeros(m, 1, dtype=dtype), torch.zeros(1, n, dtype=dtype)]
    u, v = KIND.unpack(nothing, (m, n), dtype)
    assert (u.shape, v.shape) == ((m, min(m, n) + 1), (min(m, n) + 1, n))
    assert torch.equal(u.float() @ v.float(), rounded_alone(weight, gram))
    lost = weight.double() - rounded_alone(weight, gram).double()
    values = torch.linalg.svdvals(lost @ torch.linalg.cholesky(gram.matrix.double()))
    least = float(values[9:].norm()) / float((weight.double() @ torch.linalg.cholesky(gram.matrix.double())).norm())
    assert found.relative_error() == pytest.approx(least, rel=1e-3 if dtype == torch.float32 else 0.05)


def test_a_weight_that_rounding_leaves_as_it_is_needs_no_repair():
    _, gram = drawn(20, 30, 60, 0)
    found = KIND.rounding(factorize)(torch.zeros(20, 30), gram, 3)
    assert found.relative_error() == 0
    assert float((found.u @ found.v).norm()) == 0


def inputs_of(model, rows, paths):
    """Return the calibration inputs of Linears of a base, by path."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    seen = {path: [] for path in paths}
    modules = {path: base.get_submodule(path) for path in paths}
    with torch.no_grad(), tapped(modules, dict.fromkeys(paths, "input"), lambda path, x: seen[path].append(x[0])):
        for sample in rows:
            base(**sample.inputs("cpu"))
    weights = {path: module.weight.detach().double() for path, module in modules.items()}
    return {path: torch.cat(parts).double() for path, parts in seen.items()}, weights


def test_the_emulator_is_better_than_what_it_repairs_and_with_every_rank(tiny_model, rows_file, tmp_path):
    job = compression(tiny_model, rows_file, tmp_path / "small")
    inputs, weights = inputs_of(tiny_model, job.samples, job.plan.ranks)
    before = dict.fromkeys(weights, 1.0)
    alone = {"kind": "nf4", "ratio": None, "calibration": "base"}
    for name, chosen in {"alone": alone, "a": {"ratio": 0.05}, "b": {"ratio": 0.2}}.items():
        emulator = compression(tiny_model, rows_file, tmp_path / name, **chosen).run()
        model = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto").train()
        reported = {row["path"]: row["relative_error"] for row in read_manifest(emulator)["result"]["linears"]}
        for path, x in inputs.items():
            exact = x @ weights[path].T
            with torch.no_grad():
                error = float((exact - model.get_submodule(path)(x.float()).double()).norm() / exact.norm())
            assert error < before[path]
            assert name == "alone" or reported[path] == pytest.approx(error, rel=1e-3)
            before[path] = error


@pytest.mark.parametrize(
    ("chosen", "spectra", "complaint"),
    [
        ({"ratio": 0.8}, False, "A repair of ratio 0.8 .* is hardly smaller than the base"),
        ({}, True, "kind 'nf4\\+repair' cannot be cut from spectra"),
    ],
)
def test_what_a_repair_cannot_be_combined_with(tiny_model, rows_file, tmp_path, chosen, spectra, complaint):
    sets = CompressSettings(**{"kind": KIND.name, "ratio": 0.1, "samples": 4, "selection": 2, **chosen})
    with pytest.raises(EmlocError, match=complaint):
        Compress(Checkpoint(tiny_model), load_rows(str(rows_file)), tmp_path / "emulator", sets,
                 tmp_path / "spectra" if spectra else None)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_largest_repair_is_smaller_than_the_weight(dtype):
    for m, n in ((64, 64), (4096, 1024), (3072, 8192)):
        (rank,) = uniform([(m, n)], KIND.largest_ratio)
        assert KIND.nbytes((m, n), rank, dtype) < m * n * dtype.itemsize
        assert LinearPlan("a", "", (), m, n, rank, "input").stored(KIND) == m * n + rank * (m + n)


def test_no_larger_repair_is_looked_for():
    looked = []

    def tuning(plan):
        looked.append(plan)
        return SimpleNamespace(total=plan)

    model = SimpleNamespace(kind=KIND, plan=lambda ratio: ratio, tuning=tuning, weight_bytes=lambda ratio: ratio)
    fit = largest_ratio(model, 1)
    assert fit is not None
    assert fit.ratio == max(looked) == 0.7


def test_commands_take_it(emloc, tiny_model, rows_file, tmp_path):
    options = ("--data", rows_file, "--samples", 4, "--selection", 2, "--kind", "nf4+repair", "--ratio", 0.1)
    code, out, err = emloc("compress", tiny_model, *options, "-o", tmp_path / "emulator", "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["kind"] == "nf4+repair"
