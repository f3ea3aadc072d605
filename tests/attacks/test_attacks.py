"""A model type that no plugin declares is never silently wrong: its run is right by the reference, or refused."""

import json

import pytest
import torch
from support import whole_model as reference
from support.whole_run import REFUSED, RIGHT, WAYS, whole_run

import emloc_core as emloc
from attacks import depths, flows, inputs, weights  # noqa: F401 - they fill ATTACKS
from attacks.architecture import ATTACKS, VOCABULARY, OddConfig, OddForCausalLM
from emloc_core.conformance.inputs import as_sample, number_tokenizer
from emloc_core.files.pretrained import load_model

#: Tokens of the rows: some rows are longer than those with which a model is inspected.
LENGTHS = (13, 24, 40, 18, 61, 35)
#: What is tried with every change, and in CI; each stands for others like it.
ALWAYS = ("ParallelByIndex",)
IN_CI = ("ChangedInPlace", "CastToADtype", "DiffersInOneRow", "KeepsTheLastInput", "Shuffled")


@pytest.fixture
def save(tmp_path):
    """Save a model of an attack, with a tokenizer of numbers, and return its directory."""

    def write(name):
        model = OddForCausalLM(OddConfig(name, **ATTACKS[name].config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "base")
        number_tokenizer(model.config).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return write


def rows():
    """Rows of several lengths."""
    generator = torch.Generator().manual_seed(9)
    return [as_sample({"input_ids": torch.randint(VOCABULARY, (1, length), generator=generator)}, number)
            for number, length in enumerate(LENGTHS)]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.thorough if name in IN_CI else pytest.mark.slow)
        for name in ATTACKS
    ],
)
def test_a_model_that_no_plugin_declares_is_right_or_refused(save, tmp_path, name):
    base = save(name)
    for way, settings in WAYS.items():
        verdict = whole_run(base, rows(), tmp_path / way, **settings)
        assert verdict.outcome in ([RIGHT] if ATTACKS[name].right else [RIGHT, REFUSED]), (way, verdict)
        if verdict.outcome == REFUSED:
            assert verdict.why


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["nf4", "low-rank"])
def test_the_stages_as_users_call_them_are_right_too(save, tmp_path, kind):
    """Defaults, TRL's trainer, and a correction that is chosen on held-out rows; each stage finds what was observed."""
    base, data = save("ParallelByIndex"), tmp_path / "rows.jsonl"
    numbers = torch.randint(3, VOCABULARY, (60, 12), generator=torch.Generator().manual_seed(2)).tolist()
    lines = [
        {"prompt": " ".join(map(str, row[:8])), "completion": " " + " ".join(map(str, row[8:]))} for row in numbers
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    emulator = emloc.compress(base, data, tmp_path / "emulator", kind=kind, samples=16, selection=8)
    settings = {"steps": 3, "lora_rank": 4}
    with pytest.raises(emloc.EmlocError, match="cannot recompute the activations of a OddForCausalLM"):
        emloc.train(emulator, data, tmp_path / "adapter", **settings)
    adapter = emloc.train(emulator, data, tmp_path / "adapter", **settings, gradient_checkpointing=False)
    corrected = emloc.correct(adapter, tmp_path / "corrected", base=base)
    merged = emloc.merge(corrected, tmp_path / "merged", base=base)
    model = load_model("AutoModelForCausalLM", base).eval()
    loras = reference.loras(tmp_path / "corrected")
    by_hand = {path: model.get_submodule(path).weight + lora.delta for path, lora in loras.items()}
    wanted, row = reference.with_weights(model, by_hand), [{"input_ids": torch.tensor([numbers[0]])}]
    actual = load_model("AutoModelForCausalLM", tmp_path / "merged").eval()
    torch.testing.assert_close(reference.logits(actual, row), reference.logits(wanted, row), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(reference.logits(actual, row)[0], reference.logits(model, row)[0], atol=1e-4)
    assert str(merged) == str(tmp_path / "merged")
