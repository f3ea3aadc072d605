"""An emulator that is fitted with a LoRA on: to what the base then computes, and kept with the LoRA."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import make_adapter
from support.jobs import compress_job, correct_job, exact_job, train_job
from support.marks import most_thorough
from transformers import AutoModelForCausalLM

from emloc_core.adapters.adapter import content_hash
from emloc_core.adapters.enclosed import enclosed_in
from emloc_core.adapters.moments import FILE
from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json, write_json
from emloc_core.files.manifest import CONTENT, MANIFEST, read_manifest
from emloc_core.files.pretrained import load_lora
from emloc_core.settings import CompressSettings, CorrectSettings, TrainSettings

FITTED = {"samples": 12, "selection": 6}
STEPS = {"steps": 2, "bf16": False, "logging_steps": 1, "batch_size": 2}
WEIGHTS = "adapter_model.safetensors"


def emulator_job(model, rows, output, adapter=None, kind="low-rank", **options):
    size = {"ratio": 0.3, "allocator": "uniform"} if kind == "low-rank" else {}
    return compress_job(model, rows, output, CompressSettings(kind=kind, **FITTED, **size, **options), adapter=adapter)


@pytest.fixture(scope="module")
def strong(tiny_model, tmp_path_factory):
    """A LoRA that changes what the base computes by much."""
    return make_adapter(tiny_model, tmp_path_factory.mktemp("strong") / "adapter", size=1.0)


@pytest.fixture(scope="module")
def emulators(tiny_model, rows_file, strong, tmp_path_factory):
    """Jobs and emulators: fitted without a LoRA, and with it."""
    jobs = [
        emulator_job(tiny_model, rows_file, tmp_path_factory.mktemp("fitted") / "emulator", adapter)
        for adapter in (None, strong)
    ]
    return [(job, job.run()) for job in jobs]


def outputs(directory, adapter, samples):
    model = load_lora(AutoModelForCausalLM.from_pretrained(directory, dtype="auto"), adapter).eval()
    with torch.no_grad():
        return torch.cat([model(**sample.inputs("cpu")).logits[0].log_softmax(-1) for sample in samples])


def test_it_is_nearer_to_the_base_with_that_lora(emulators, tiny_model, strong):
    expected = outputs(tiny_model, strong, emulators[0][0].samples)
    apart = [
        float((expected.exp() * (expected - outputs(emulator, strong, job.samples))).sum(-1).mean())
        for job, emulator in emulators
    ]
    assert apart[1] < 0.9 * apart[0]


@pytest.mark.parametrize("kind", most_thorough(["nf4", "trellis"], "nf4"))
def test_a_lora_that_adds_nothing_changes_nothing(kind, tiny_model, rows_file, tmp_path):
    zero = make_adapter(tiny_model, tmp_path / "zero", size=0.0)
    plain, fitted = (
        emulator_job(tiny_model, rows_file, tmp_path / name, adapter, kind).run()
        for name, adapter in (("plain", None), ("fitted", zero))
    )
    assert shards(plain)
    assert shards(plain) == shards(fitted)


def shards(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def test_it_keeps_the_lora_which_is_trained_further(emulators, tiny_model, rows_file, strong, tmp_path):
    emulator = emulators[1][1]
    kept = enclosed_in(emulator)
    assert load_file(kept / WEIGHTS).keys() == load_file(strong / WEIGHTS).keys()
    assert not [path for path in kept.iterdir() if str(tiny_model).encode() in path.read_bytes()]  # it may be published
    still = TrainSettings(learning_rate=1e-30, **STEPS)
    for name, job in (("ordinary", train_job), ("exact", exact_job)):
        tuned = job(emulator, rows_file, tmp_path / name, still).run()
        before, after = load_file(strong / WEIGHTS), load_file(tuned / WEIGHTS)
        assert all(torch.equal(before[key], after[key]) for key in before), name
        settings = read_json(tuned / MANIFEST)["request"]["settings"]
        assert (settings["lora_rank"], settings["lora_alpha"]) == (4, 8)
    corrected = correct_job(tmp_path / "ordinary", tiny_model, tmp_path / "corrected", CorrectSettings()).run()
    further = emulator_job(tiny_model, rows_file, tmp_path / "further", corrected).run()  # a third round
    assert read_manifest(further)["inputs"]["adapter"] == str(corrected)
    assert (enclosed_in(further) / FILE).read_bytes() == (corrected / FILE).read_bytes()


def test_the_optimiser_begins_with_its_moments(tiny_model, rows_file, tmp_path):
    settings = TrainSettings(learning_rate=1e-2, **{**STEPS, "steps": 12}, lora_rank=4)
    tuned = train_job(tiny_model, rows_file, tmp_path / "tuned", settings).run()
    emulator = emulator_job(tiny_model, rows_file, tmp_path / "emulator", tuned, "nf4").run()
    one = TrainSettings(learning_rate=1e-2, **{**STEPS, "steps": 1})
    moved = {}
    for name in ("with", "without"):
        output = train_job(emulator, rows_file, tmp_path / name, one).run()
        before, after = load_file(tuned / WEIGHTS), load_file(output / WEIGHTS)
        moved[name] = float(torch.cat([(before[key] - after[key]).abs().flatten() for key in before]).mean())
        (enclosed_in(emulator) / FILE).unlink(missing_ok=True)
    assert moved["without"] == pytest.approx(1e-2, rel=0.05)
    assert moved["with"] < 0.4e-2


def test_another_lora_makes_another_emulator(emulators, tiny_model, rows_file, tmp_path):
    job, emulator = emulators[1]
    before = shards(emulator)
    other = make_adapter(tiny_model, tmp_path / "other", size=0.3)
    with pytest.raises(EmlocError, match=r"made from something else: .*adapter"):
        emulator_job(tiny_model, rows_file, emulator, other).run()
    assert job.run() == emulator  # the same one is there
    assert shards(emulator) == before


def test_what_cannot_be_trained_further_is_refused(emulators, rows_file, tmp_path):
    emulator = emulators[1][1]
    for options, message in (
        ({"lora_rank": 8}, "was fitted with a LoRA whose lora_rank is 4"),
        ({"use_rslora": True}, "whose use_rslora is False"),
        ({"modules_to_save": ["lm_head"]}, "trained further on answers alone"),
    ):
        with pytest.raises(EmlocError, match=message):
            train_job(emulator, rows_file, tmp_path / "tuned", TrainSettings(**{**STEPS, **options}))


def test_a_lora_that_it_cannot_be_fitted_with_is_refused(
    emulators, tiny_model, shallow_model, strong, rows_file, tmp_path
):
    output = tmp_path / "emulator"
    with pytest.raises(EmlocError, match="fits to the base as it is"):
        emulator_job(tiny_model, rows_file, output, strong, calibration="base")
    saved = make_adapter(tiny_model, tmp_path / "saved", modules_to_save=["lm_head"])
    with pytest.raises(EmlocError, match="trains more"):
        emulator_job(tiny_model, rows_file, output, saved)
    with pytest.raises(EmlocError, match="no Linear at"):
        emulator_job(shallow_model, rows_file, output, strong)
    uncorrected = train_job(emulators[0][1], rows_file, tmp_path / "tuned", TrainSettings(**STEPS)).run()
    with pytest.raises(EmlocError, match="is not corrected"):
        emulator_job(tiny_model, rows_file, output, uncorrected).run()
    manifest = {"kind": "adapter", "request": {"model": "any", "settings": {"objective": "dpo"}}}
    taught = tmp_path / "taught"
    shutil.copytree(strong, taught)
    write_json(taught / MANIFEST, manifest | {"result": {CONTENT: content_hash(taught)}})
    with pytest.raises(EmlocError, match="learned preferences"):
        emulator_job(tiny_model, rows_file, output, taught)
    assert not output.exists()


def test_a_folder_of_that_name_in_any_other_model_is_not_trained(tiny_model, strong, rows_file, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    shutil.copytree(strong, model / "adapter")
    tuned = train_job(
        model, rows_file, tmp_path / "tuned", TrainSettings(learning_rate=1e-30, lora_rank=2, **STEPS)
    ).run()
    assert read_json(tuned / "adapter_config.json")["r"] == 2
