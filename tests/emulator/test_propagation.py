"""Error-propagating calibration: the fit itself, and an emulator made by it."""

from collections import Counter

import pytest
import torch
from support.jobs import compress_job
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import emloc_core.standins.quantizer  # noqa: F401  registers the emulator's loader
from emloc_core.algorithms.factorize import factorize
from emloc_core.algorithms.statistics import cheaper_side
from emloc_core.emulator.propagation import RIDGE, PairedMoments
from emloc_core.errors import EmlocError
from emloc_core.files.manifest import read_manifest
from emloc_core.settings import CompressSettings

SETTINGS = CompressSettings(samples=24, selection=6, ratio=0.6, allocator="uniform")


@pytest.mark.parametrize("outputs", [(4,), (2, 3), (8,), (3, 3), (4, 9)], ids=str)
def test_the_fit_is_the_ridge_regression_on_the_tokens_themselves(outputs):
    """However many outputs the group has, beside six inputs."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    xc = x + 0.3 * noise
    weights = [torch.randn(m, 6, generator=generator, dtype=torch.float64) for m in outputs]
    moments = PairedMoments(weights, dtype=torch.float64)
    moments.add(x[:20], xc[:20])
    moments.add(x[20:], xc[20:])
    ridge = RIDGE * float((xc.T @ xc).diagonal().mean())
    # The same as ordinary least squares on tokens with sqrt(ridge) I appended to both sides.
    extra = ridge**0.5 * torch.eye(6, dtype=torch.float64)
    inputs = torch.cat([xc, extra])
    for weight, fitted in zip(weights, moments.fit(), strict=True):
        expected = torch.linalg.lstsq(inputs, torch.cat([x, extra]) @ weight.T).solution.T
        assert torch.allclose(fitted, expected, atol=1e-10)


def test_without_an_error_to_make_up_for_the_weight_stays():
    x = torch.randn(40, 6, dtype=torch.float64)
    weight = torch.randn(4, 6, dtype=torch.float64)
    moments = PairedMoments([weight], dtype=torch.float64)
    moments.add(x, x)
    assert torch.allclose(moments.fit()[0], weight, atol=1e-9)


@pytest.mark.parametrize("m", [96, 384])
@pytest.mark.parametrize("scale", [1e2, 3e4])
def test_massive_activations_do_not_spoil_the_fit(scale, m):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, 256, generator=generator) / 16
    x = torch.randn(2048, 256, generator=generator)
    x[::256] *= scale
    xc = x * (1 + 0.05 * torch.randn(2048, 256, generator=generator))
    moments, exact = PairedMoments([weight]), PairedMoments([weight], dtype=torch.float64)
    for rows in torch.arange(2048).split(128):
        moments.add(x[rows], xc[rows])
        exact.add(x[rows], xc[rows])
    (target,), (fitted,) = exact.fit(), moments.fit()
    factors = factorize(fitted, moments.gram_for(fitted, cheaper_side(m, 256)), 50)
    outputs = xc.double() @ target.T
    least = torch.linalg.svdvals(outputs)[50:].norm()
    assert (outputs - xc.double() @ (factors.u.double() @ factors.v.double()).T).norm() <= 1.0005 * least


@pytest.mark.parametrize("scale", [1e-25, 1e17])
def test_the_fit_is_the_same_at_any_scale(scale):
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(50, 6, generator=generator) for _ in range(2))
    weight = torch.randn(4, 6, generator=generator)
    fitted = []
    for factor in (1, scale):
        moments = PairedMoments([weight])
        moments.add(factor * x, factor * (x + 0.3 * noise))
        fitted.append(moments.fit()[0].float())
    assert torch.allclose(*fitted, rtol=1e-4, atol=1e-5)


def test_sums_beyond_the_range_are_refused():
    x = torch.randn(50, 6)
    x[3] *= 1e25  # one token: the others are summed in fp32
    moments = PairedMoments([torch.ones(4, 6)])
    moments.add(x, x)
    with pytest.raises(EmlocError, match="too large"):
        moments.fit()


def test_the_gram_is_that_of_the_emulators_inputs_or_of_outputs():
    x, weight = torch.randn(40, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    moments = PairedMoments([weight], dtype=torch.float64)
    moments.add(x, x)
    of_inputs, of_outputs = (moments.gram_for(weight, side) for side in ("input", "output"))
    assert (of_inputs.side, of_outputs.side) == ("input", "output")
    assert torch.allclose(of_inputs.matrix, x.T @ x, atol=1e-9)
    assert torch.allclose(of_outputs.matrix, (x @ weight.T).T @ (x @ weight.T), atol=1e-9)


def logits(model, samples):
    with torch.no_grad():
        return torch.cat([model(**sample.inputs("cpu")).logits[0] for sample in samples])


def test_the_whole_model_is_closer_to_the_base_on_the_calibration_rows(tiny_model, rows_file, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto").eval()
    errors = {}
    for calibration in ("base", "propagated"):
        settings = SETTINGS.model_copy(update={"calibration": calibration})
        job = compress_job(tiny_model, rows_file, tmp_path / calibration, settings)
        emulator = AutoModelForCausalLM.from_pretrained(job.run(), dtype="auto").eval()
        expected = logits(base, job.samples)
        errors[calibration] = float((logits(emulator, job.samples) - expected).norm() / expected.norm())
    assert errors["propagated"] < 0.95 * errors["base"], errors
    ranks = [
        [row["rank"] for row in read_manifest(tmp_path / calibration)["result"]["linears"]] for calibration in errors
    ]
    assert ranks[0] == ranks[1]  # better at equal size


@pytest.mark.parametrize("chosen", [{"kind": "nf4"}, {"allocator": "uniform"}], ids=str)
def test_each_row_passes_each_block_once_in_either_stream(tiny_model, rows_file, tmp_path, chosen):
    settings = CompressSettings(samples=5, selection=2, **chosen)
    job = compress_job(tiny_model, rows_file, tmp_path / "emulator", settings)
    counted = Counter()
    for index, block in enumerate(job.base.skeleton.model.model.layers):
        block.register_forward_hook(lambda *_, index=index: counted.update([index]))
    job.run()
    assert counted == dict.fromkeys(range(3), 2 * 5)


def twice(self, x):
    return self.down_proj(self.gate_proj(x) * self.up_proj(x)) + self.down_proj(self.up_proj(x))


def one_of_a_group_twice(self, x):
    return self.down_proj(self.gate_proj(x) * self.up_proj(x) + self.up_proj(x))


def nothing(_self, x):
    return x


def not_the_last(self, x):
    return (self.gate_proj(x) + self.up_proj(x))[..., : x.shape[-1]]


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (twice, "twice"),
        (one_of_a_group_twice, "twice"),
        (nothing, "gate_proj did not"),
        (not_the_last, "down_proj did"),
    ],
)
def test_linears_that_do_not_run_once_are_refused(tiny_model, rows_file, tmp_path, monkeypatch, forward, message):
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    settings = CompressSettings(samples=3, selection=2, kind="nf4")
    with pytest.raises(EmlocError, match=message):
        compress_job(tiny_model, rows_file, tmp_path / "emulator", settings).run()


def test_whichever_of_a_group_runs_first_waits_for_all(tiny_model, rows_file, tmp_path, monkeypatch):
    def swapped(self, x):
        return self.down_proj(self.up_proj(x) * silu(self.gate_proj(x)))

    places = []
    settings = CompressSettings(samples=3, selection=2, kind="nf4")
    for name in ("declared", "swapped"):
        places.append(compress_job(tiny_model, rows_file, tmp_path / name, settings).run())
        monkeypatch.setattr(LlamaMLP, "forward", swapped)
    shards = sorted(path.name for path in places[0].glob("*.safetensors"))
    assert all((places[0] / name).read_bytes() == (places[1] / name).read_bytes() for name in shards)


@pytest.mark.parametrize("heavy", [False, True])
def test_targets_are_the_same_where_the_gram_is_narrowed(heavy):
    weight, x = torch.randn(6, 24), torch.randn(300, 24)
    xc = x + 0.1 * torch.randn(300, 24)
    if heavy:
        x[0], xc[0] = 1000 * x[0], 1000 * xc[0]
    targets, grams = [], []
    for narrow in (False, True):
        moments = PairedMoments([weight], narrow=narrow)
        moments.add(x, xc)
        targets += moments.fit()
        grams.append(moments.emulator)
    assert torch.equal(*targets)
    assert torch.equal(grams[0].single, grams[1].single)
    assert len(grams[0].parts()[1]) == heavy
    assert not len(grams[1].parts()[1])
