"""The format of emulator of docs/formats.md: made, loaded, trained, corrected and planned like a built-in one."""

import json
from types import ModuleType

import pytest
import torch
from support.paths import DOCS
from transformers import AutoModelForCausalLM

from emloc_core.errors import EmlocError
from emloc_core.hookspecs import hookimpl
from emloc_core.plugins.manager import plugin_manager
from emloc_core.standins import Packed
from emloc_core.testing import check_format


def module_of_the_page():
    """The plugin's module, with the code of the page."""
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    module = ModuleType("eight_bits")
    exec(page.partition("```python\n")[2].partition("```")[0], vars(module))
    return module


eight_bits = module_of_the_page()
EightBits, EightBitLinear = eight_bits.EightBits, eight_bits.EightBitLinear


@pytest.fixture
def installed():
    """The plugin, as its entry point loads it."""
    plugin_manager().register(eight_bits, "eight_bits")
    yield
    plugin_manager().unregister(eight_bits)


def run(emloc, *arguments):
    code, out, err = emloc(*arguments)
    assert code == 0, err
    return out


def test_it_passes_the_checks():
    results = check_format(EightBits())
    assert [str(result) for result in results if not result.passed] == []
    assert [result.check for result in results] == [
        "stored", "read", "layer", "experts", "trains", "correction", "merge", "planned"
    ]  # fmt: skip


@pytest.mark.usefixtures("installed")
def test_every_stage_takes_it(emloc, shallow_model, rows_file, tmp_path):
    common = ("--data", rows_file, "--samples", 4, "--selection", 2, "--kind", "8-bit")
    output = run(emloc, "compress", shallow_model, *common, "-o", tmp_path / "emulator", "--dry-run")
    assert "-> 8-bit" in output
    planned = json.loads(run(emloc, "plan", shallow_model, "--kind", "8-bit", "--memory", "1GiB", "--json"))
    assert planned["kind"] == "8-bit"
    run(emloc, "compress", shallow_model, *common, "-o", tmp_path / "emulator")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "emulator", dtype="auto")
    layers = [module for module in model.modules() if isinstance(module, EightBitLinear)]
    assert len(layers) == 7
    assert {layer.weight.dtype for layer in layers} == {torch.int8}
    tuning = ("--steps", 2, "--batch-size", 2, "--no-bf16")
    run(emloc, "train", tmp_path / "emulator", "--data", rows_file, *tuning, "-o", tmp_path / "adapter")
    run(emloc, "correct", tmp_path / "adapter", "--base", shallow_model, "-o", tmp_path / "corrected")
    run(emloc, "merge", tmp_path / "corrected", "--base", shallow_model, "-o", tmp_path / "merged")
    exact = ("--steps", 1, "--batch-size", 2, "--no-bf16", "--exact")
    run(emloc, "train", tmp_path / "emulator", "--data", rows_file, *exact, "-o", tmp_path / "streamed")


def test_without_its_plugin_an_emulator_says_what_is_missing(emloc, shallow_model, rows_file, tmp_path):
    plugin_manager().register(eight_bits, "eight_bits")
    try:
        common = ("--data", rows_file, "--samples", 4, "--selection", 2, "--kind", "8-bit")
        run(emloc, "compress", shallow_model, *common, "-o", tmp_path / "emulator")
    finally:
        plugin_manager().unregister(eight_bits)
    with pytest.raises(EmlocError, match=r"no '8-bit' among the emulators"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "emulator", dtype="auto")


def test_a_format_that_is_offered_under_another_name_is_refused_before_anything_is_made(
    emloc, shallow_model, rows_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(EightBits, "name", "eight")
    other = ModuleType("other_name")
    other.emloc_emulators = hookimpl(lambda: {"8-bit": EightBits})
    plugin_manager().register(other)
    try:
        common = ("--data", rows_file, "--samples", 4, "--selection", 2, "--kind", "8-bit")
        code, _, err = emloc("compress", shallow_model, *common, "-o", tmp_path / "emulator", "--dry-run")
    finally:
        plugin_manager().unregister(other)
    assert (code, "offers as '8-bit' is named 'eight'" in err) == (1, True), err


class Coarse(EightBits):
    """Says that it makes no error."""

    def fit(self, weights, gram, ranks):
        fitted = super().fit(weights, gram, ranks)
        return [Packed(packed.parts, packed.shape, 0.5) for packed in fitted]


class Wide(EightBits):
    """Stores scales in another dtype than its layer has."""

    def pack(self, fitted, dtype):
        parts = super().pack(fitted, dtype)
        return {**parts, "weight_scales": parts["weight_scales"].double()}


class Other(EightBits):
    """Reads another weight than its layer unpacks, and packs experts too."""

    experts = True

    class layer(EightBitLinear):  # noqa: N801
        def forward(self, input):
            return 1.01 * super().forward(input)


class Crossed(EightBits):
    """Gives experts each other's matrices."""

    experts = True

    class layer(EightBitLinear):  # noqa: N801
        @classmethod
        def unpack_stack(cls, *parts, **options):
            return super().unpack_stack(*parts, **options).flip(0)


@pytest.mark.parametrize(
    ("format", "check", "expected"),
    [
        (Crossed, "experts", "outputs are not those of the matrices that are read"),
        (Coarse, "read", "but reported as 0.5000"),
        (Wide, "stored", "weight_scales is torch.float64"),
        (Other, "layer", "outputs are not those of the weight that is read"),
    ],
)
def test_a_check_says_what_is_wrong(format, check, expected):
    failed = {result.check: str(result) for result in check_format(format()) if not result.passed}
    assert expected in failed[check]
    assert ("experts" in failed) == (format is not Other)
