"""A LoRA on a base in four bits, as bitsandbytes packs it: trained there, merged into the original."""

import pytest
import torch
from emloc_llama import LLAMA
from support.models import save_tiny_model
from transformers import AutoModelForCausalLM

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.merge import Merge
from emloc_core.data.rows import load_rows
from emloc_core.emulator.compress import Compress
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.output import MANIFEST
from emloc_core.requests import CorrectRequest
from emloc_core.settings import CompressSettings, PolishSettings, TrainSettings
from emloc_core.stages.perform import prepare
from emloc_core.tuning.exact import Polish
from emloc_core.tuning.train import Train


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny_model(LLAMA.tiny_configs[0], tmp_path_factory.mktemp("original") / "base")


@pytest.fixture(scope="module")
def adapter(original, rows_file, tmp_path_factory):
    """A LoRA on the original in four bits, which nothing says is from it."""
    directory = tmp_path_factory.mktemp("four_bits")
    settings = CompressSettings(kind="nf4", calibration="none")
    packed = Compress(Checkpoint(original), load_rows(str(rows_file)), directory / "packed", settings).run()
    (packed / MANIFEST).unlink()
    settings = TrainSettings(steps=2, batch_size=4, learning_rate=0.01)
    return Adapter(Train(packed, str(rows_file), directory / "adapter", settings).run())


def test_it_is_merged_into_the_original_that_is_named(adapter, original, tmp_path):
    with pytest.raises(EmlocError, match=r"is quantised.*Give the original, unquantised model with --base"):
        Merge(adapter, Checkpoint(adapter.base_name), tmp_path / "merged")
    merged = Merge(adapter, Checkpoint(original), tmp_path / "merged").run()
    before, after = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (original, merged))
    for path, lora in adapter.loras.items():
        change = lora.scale * lora.b.float() @ lora.a.float()
        torch.testing.assert_close(after[f"{path}.weight"] - before[f"{path}.weight"], change, atol=1e-6, rtol=1e-4)


def test_another_model_is_not_its_original(adapter, original, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(original)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "other")
    job = Merge(adapter, Checkpoint(tmp_path / "other"), tmp_path / "merged")
    with pytest.raises(EmlocError, match="made for another base"):
        job.run()


@pytest.mark.parametrize("in_four_bits", [True, False])
def test_exact_steps_follow_on_either(adapter, original, rows_file, tmp_path, in_four_bits):
    base = Checkpoint(adapter.base_name if in_four_bits else original)
    polished = Adapter(Polish(adapter, base, str(rows_file), tmp_path / "a", PolishSettings(steps=1)).run())
    assert polished.loras.keys() == adapter.loras.keys()
    if not in_four_bits:
        Merge(polished, base, tmp_path / "merged").run()


@pytest.mark.parametrize("named", [False, True])
def test_there_is_nothing_to_correct_which_is_said(adapter, original, tmp_path, named):
    """The copy is for the base that is named, and can be merged into it."""
    base = {"base": str(original)} if named else {}
    job = prepare(CorrectRequest(adapter=adapter.directory, output=tmp_path / "corrected", **base))
    assert any("no emulator: the LoRA stays as it is" in warning for warning in job.warnings)
    corrected = Adapter(job.run())
    assert corrected.is_corrected
    assert corrected.model_name == (str(original) if named else adapter.model_name)
    assert all(torch.equal(lora.a, adapter.loras[path].a) for path, lora in corrected.loras.items())
    if named:
        Merge(corrected, Checkpoint(original), tmp_path / "merged").run()
