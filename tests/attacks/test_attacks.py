"""A model type that no plugin declares is never silently wrong: its run is right by the reference, or refused."""

import pytest
import torch
from support.whole_run import REFUSED, RIGHT, WAYS, whole_run

from attacks import depths, flows, inputs, weights  # noqa: F401 - they fill ATTACKS
from attacks.architecture import ATTACKS, VOCABULARY, OddConfig, OddForCausalLM
from emloc_core.conformance.inputs import as_sample, number_tokenizer

#: Tokens of the rows: some are longer than those that a model is looked at with.
LENGTHS = (13, 24, 40, 18, 61, 35)
#: What is tried with every change; each stands for others like it.
ALWAYS = ("ParallelByIndex", "DiffersInOneRow", "ChangedInPlace", "CastToADtype", "KeepsTheLastInput", "Shuffled")


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
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.thorough) for name in ATTACKS]
)
def test_a_model_that_no_plugin_declares_is_right_or_refused(save, tmp_path, name):
    base = save(name)
    for way, settings in WAYS.items():
        verdict = whole_run(base, rows(), tmp_path / way, **settings)
        assert verdict.outcome in ([RIGHT] if ATTACKS[name].right else [RIGHT, REFUSED]), (way, verdict)
        if verdict.outcome == REFUSED:
            assert verdict.why
