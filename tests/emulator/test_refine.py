"""Refinement of a block's stand-ins: it brings the block nearer to the base's, and says how near."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from support.errors import require_reported_errors
from support.jobs import compress_job
from support.marks import most_thorough
from transformers import AutoModelForCausalLM, AutoTokenizer

import emloc_core.standins.quantizer  # noqa: F401  registers the emulator's loader
from emloc_core.algorithms import levels, trellis
from emloc_core.errors import EmlocError
from emloc_core.model.hooks import forward_hooks
from emloc_core.settings import CompressSettings


@pytest.fixture(scope="module", params=most_thorough(["2.7-bit", "trellis", "low-rank"], "2.7-bit", "trellis"))
def emulators(request, tiny_model, rows_file, tmp_path_factory):
    """Emulators without refinement and with it, and their job; scales are off at first, to leave something to gain."""
    scales, typical, emulators = levels._scales, trellis._scales, []
    size = {"ratio": 0.3} if request.param == "low-rank" else {}
    for passes in (0, 20 if request.param == "low-rank" else 3):
        output = tmp_path_factory.mktemp("refine") / "emulator"
        options = {"samples": 12, "selection": 6, "refine": passes, "calibration": "propagated"}
        chosen = CompressSettings(kind=request.param, **options, **size)
        job = compress_job(tiny_model, rows_file, output, chosen)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(levels, "rounded", partial(levels.rounded, passes=0))
            patch.setattr(levels, "_scales", lambda *args: (1.3 * scales(*args)).bfloat16())
            patch.setattr(trellis, "rounded", partial(trellis.rounded, passes=0))
            patch.setattr(trellis, "_scales", lambda *args: (1.3 * typical(*args)).bfloat16())
            emulators.append((job, job.run()))
    return emulators


def hidden(model, samples):
    """What the blocks pass on, for every row and block."""
    states = []

    def keep(_module, _args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    with torch.no_grad(), forward_hooks((block, keep) for block in model.model.layers):
        for sample in samples:
            model(**sample.inputs("cpu"))
    return states


def test_hidden_states_come_nearer_to_those_of_the_base(emulators, tiny_model):
    job, _ = emulators[0]
    expected = hidden(AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto"), job.samples)
    apart = []
    for _, emulator in emulators:
        actual = hidden(AutoModelForCausalLM.from_pretrained(emulator, dtype="auto"), job.samples)
        parts = [((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in zip(actual, expected, strict=True)]
        apart.append(float(torch.stack(parts).mean()))
    assert apart[1] < 0.9 * apart[0]


def test_reported_errors_are_those_on_the_inputs_in_the_emulator(emulators, tiny_model):
    job, emulator = emulators[1]
    model = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto")
    require_reported_errors(tiny_model, emulator, job.samples, model)


def test_what_may_move_moves_and_nothing_else(emulators):
    plain, refined = (
        {name: tensor for shard in path.glob("*.safetensors") for name, tensor in load_file(shard).items()}
        for _, path in emulators
    )
    first = [name for name in plain if name.startswith("model.layers.0.")]
    changed = {name.rpartition(".")[2] for name in first if not torch.equal(plain[name], refined[name])}
    assert changed == ({"weight_scales"} if emulators[0][0].format.name != "low-rank" else {"weight", "V"})


@pytest.mark.thorough
def test_gradients_do_not_vanish_in_half_precision(tiny_model, rows_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    outer = [part for layer in model.model.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    with torch.no_grad():  # the smaller a change is beside its token, the smaller its gradient
        for module in (model.model.embed_tokens, *outer):
            module.weight.mul_(300_000)
    base = tmp_path / "base"
    model.half().save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    errors = []
    for passes in (0, 20):
        options = {"samples": 12, "selection": 6, "refine": passes, "calibration": "propagated"}
        chosen = CompressSettings(kind="low-rank", ratio=0.3, **options)
        job = compress_job(base, rows_file, tmp_path / f"{passes}", chosen)
        expected = hidden(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), job.samples)
        actual = hidden(AutoModelForCausalLM.from_pretrained(job.run(), dtype="auto"), job.samples)
        pairs = [(a.float(), b.float()) for a, b in zip(actual, expected, strict=True)]
        errors.append(float(torch.stack([((a - b).norm(dim=-1) / b.norm(dim=-1)).mean() for a, b in pairs]).mean()))
    assert errors[1] < 0.92 * errors[0]  # without scaling the loss, 0.96


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"kind": "low-rank-nf4", "refine": 2}, "'low-rank-nf4' cannot be refined"),
        ({"kind": "2.7-bit", "refine": 2, "calibration": "base"}, "needs the inputs that a block has in the emulator"),
        ({"kind": "low-rank", "refine": 2, "calibration": "base"}, "needs the inputs that a block has in the emulator"),
    ],
)
def test_what_cannot_be_refined_is_refused(tiny_model, rows_file, tmp_path, chosen, message):
    with pytest.raises(EmlocError, match=message):
        compress_job(tiny_model, rows_file, tmp_path / "x", CompressSettings(**chosen))
