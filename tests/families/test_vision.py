"""Images all the way: both towers are compressed, tuned, corrected and merged, and every stage reads the same rows."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from emloc_internvl import INTERNVL
from emloc_qwen import QWEN_MOE, QWEN_VL
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file
from support.jobs import compress_job, correct_job, merge_job, train_job
from support.marks import most_thorough, thorough
from support.rows import write_jsonl
from support.run import PLAIN_TRAINING
from support.vision_models import internvl_processor, picture, picture_rows, qwen_processor, save_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import emloc_core.standins.quantizer  # noqa: F401  registers the emulator's loader
import emloc_core.tuning.trainer as stage
from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.candidates import CANDIDATES
from emloc_core.data.rows import load_rows
from emloc_core.data.tokenize import encode, load_processing
from emloc_core.files.manifest import read_manifest
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import make_workload
from emloc_core.settings import CompressSettings, CorrectSettings, TrainSettings

MODELS = {"internvl": (INTERNVL, internvl_processor), "qwen2_5_vl": (QWEN_VL, qwen_processor)}


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    return picture_rows(tmp_path_factory.mktemp("pictures") / "data")


#: Of what towers of any family have in common, one is shown.
ONE = pytest.mark.parametrize("base", most_thorough(MODELS, "internvl"), indirect=True)


@pytest.fixture(scope="session", params=MODELS)
def base(request, tmp_path_factory) -> Path:
    family, processor = MODELS[request.param]
    return save_model(tmp_path_factory.mktemp("models") / request.param, family, request.param, processor())


@pytest.fixture(scope="session")
def emulator(base, rows_file, tmp_path_factory) -> Path:
    return compress(base, rows_file, tmp_path_factory.mktemp("emulators") / base.name)


@pytest.fixture(scope="session")
def adapter(emulator, rows_file, tmp_path_factory) -> Path:
    return finetune(emulator, rows_file, tmp_path_factory.mktemp("adapters") / emulator.name)


def compress(base, rows_file, output, **settings):
    plain = {"samples": 24, "selection": 8, "ratio": 0.6, "calibration": "base", "allocator": "uniform"}
    chosen = CompressSettings(**{**plain, **settings})
    return compress_job(base, rows_file, output, chosen).run()


def finetune(model, rows_file, output, **settings):
    chosen = TrainSettings(**{"steps": 6, "batch_size": 4, "bf16": False, "learning_rate": 5e-3, **settings})
    return train_job(model, rows_file, output, chosen).run()


def load(directory, adapter=None):
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto").eval()
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()


def pictured(rows_file, count=3):
    return [row for row in load_rows(str(rows_file)) if row.images][:count]


def logits(model, base, rows):
    family = MODELS[model.config.model_type][0]
    samples = encode(rows, load_processing(base, family, rows))
    with torch.no_grad():
        return torch.cat([model(**sample.inputs("cpu")).logits[0] for sample in samples])


def linears(emulator):
    return read_manifest(emulator)["result"]["linears"]


def towers(paths):
    return {"vision" if "language_model" not in path else "language" for path in paths}


def test_both_towers_are_compressed_with_the_error_that_a_whole_forward_has(base, emulator):
    entries = read_manifest(emulator)["result"]["linears"]
    assert all(entry["rank"] for entry in entries)
    assert towers(entry["path"] for entry in entries) == {"vision", "language"}
    dense_model, compressed = load(base), load(emulator)
    outputs = {entry["path"]: torch.zeros(2, dtype=torch.float64) for entry in entries}  # of error and output, squared

    def gather(path):
        dense, factors = dense_model.get_submodule(path), compressed.get_submodule(path)

        def hook(_module, args, _output):
            x = args[0].double()
            expected = x @ dense.weight.double().T
            error = expected - x @ (factors.weight.double() @ factors.V.double()).T
            outputs[path] += torch.stack([error.square().sum(), expected.square().sum()])

        return hook

    # What the first Linears of Qwen-VL read has fewer ranks than their factors: no error but rounding.
    for path in outputs:
        dense_model.get_submodule(path).register_forward_hook(gather(path))
    kept = load_rows(str(emulator / "calibration.jsonl"))
    assert {bool(row.images) for row in kept} == {True, False}  # rows without an image were among them
    logits(dense_model, base, kept)
    for entry in entries:
        error, output = outputs[entry["path"]].tolist()
        assert (error / output) ** 0.5 == pytest.approx(entry["relative_error"], rel=1e-3, abs=5e-4), entry["path"]
    assert sum(entry["relative_error"] > 0.01 for entry in entries) > 0.8 * len(entries)


def test_the_emulator_keeps_its_images_and_the_processors_files(base, emulator, rows_file, tmp_path):
    moved = shutil.copytree(emulator, tmp_path / "moved")
    drawn = {row.key for row in load_rows(str(rows_file))}
    for name, count in (("calibration.jsonl", 24), ("selection.jsonl", 8)):
        kept = load_rows(str(moved / name))
        assert len(kept) == count
        assert {row.key for row in kept} <= drawn
        assert all(picture.path.parent == moved / "images" for row in kept for picture in row.images)
    before, after = (AutoProcessor.from_pretrained(directory) for directory in (base, moved))
    assert type(after) is type(before)
    assert after.chat_template == before.chat_template
    assert after.image_processor.to_dict() == before.image_processor.to_dict()


def of_trl(base, rows, tmp_path, max_length):
    """What SFTTrainer's collator makes of each row alone."""
    trainer = SFTTrainer(
        load(base),
        args=SFTConfig(output_dir=str(tmp_path), max_length=max_length, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(base),
    )
    return [trainer.data_collator([row]) for row in trainer.train_dataset]


def rows_for_trl(form):
    red, blue = (Image.new("RGB", (24, 8), colour) for colour in ("red", "blue"))
    system = {"role": "system", "content": "be brief."}
    user, answer = {"role": "user", "content": "which colours?"}, {"role": "assistant", "content": "red and blue."}
    rows = [
        {"prompt": [user], "completion": [answer], "images": [red, blue]},
        {"prompt": [system, user, answer, user], "completion": [answer], "images": [blue]},
        {"prompt": [user], "completion": [answer], "images": []},
    ]
    if form == "parts":
        text, image = {"type": "text", "text": "a cat and "}, {"type": "image"}
        for row, parts in zip(rows, ([image, text, image], [text, image], [text, text]), strict=True):
            row["prompt"] = [{"role": "user", "content": parts}]
            row["completion"] = [{"role": "assistant", "content": [{"type": "text", "text": "red."}]}]
    return rows


@pytest.mark.parametrize("cut", [*thorough(False), True])
@pytest.mark.parametrize("form", ["strings", "parts"])
def test_samples_equal_what_trl_trains_on(base, tmp_path, form, cut):
    raw = rows_for_trl(form)
    expected = of_trl(base, raw, tmp_path, None)
    max_length = max(batch["input_ids"].shape[1] for batch in expected) - 2 if cut else None
    if cut:
        expected = of_trl(base, raw, tmp_path, max_length)
    for number, row in enumerate(raw):
        for index, image in enumerate(row["images"]):
            image.save(tmp_path / f"{number}-{index}.png")
        row["images"] = [f"{number}-{index}.png" for index in range(len(row["images"]))]
    rows = load_rows(str(write_jsonl(tmp_path / "rows.jsonl", raw)))
    samples = encode(rows, load_processing(base, MODELS[base.name][0], rows), max_length)
    for sample, batch in zip(samples, expected, strict=True):
        labels = batch.pop("labels")[0]
        assert sample.completion_mask == [int(label != -100) for label in labels]
        assert 0 < sum(sample.completion_mask) < len(sample.input_ids)
        inputs = sample.inputs("cpu")
        assert inputs.keys() == batch.keys()
        for name, tensor in batch.items():
            assert torch.equal(inputs[name], tensor), name
    if cut:
        assert max(len(sample.input_ids) for sample in samples) == max_length


def test_an_image_gives_pixels_in_the_models_dtype(base, rows_file):
    rows = pictured(rows_file, 1)
    (sample,) = encode(rows, load_processing(base, MODELS[base.name][0], rows), dtype=torch.bfloat16)
    inputs = sample.inputs("cpu")
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert {tensor.dtype for name, tensor in inputs.items() if name != "pixel_values"} == {torch.int64}


@pytest.mark.parametrize("clamp", ["auto", *thorough("none")])
def test_an_adapter_is_carried_over_and_merged_in_both_towers(base, emulator, adapter, rows_file, tmp_path, clamp):
    loras = Adapter(adapter).loras
    assert towers(loras) == {"vision", "language"}
    assert all(lora.b.abs().max() > 0 for lora in loras.values())  # gradients reached them all
    job = correct_job(adapter, base, tmp_path / "corrected", CorrectSettings(clamp=clamp))
    corrected = job.run()
    rows = pictured(rows_file)
    carried = load(base, corrected)
    expected = logits(carried, base, rows)
    if clamp == "auto":
        result = read_manifest(corrected)["result"]
        assert [entry["rows"] for entry in result["candidates"]] == [8] * len(CANDIDATES)
        # The loss of the uncorrected adapter, measured by streaming, is that of the base with it in memory.
        kept = load_rows(str(emulator / "selection.jsonl"))
        assert result["candidates"][0]["nll"] == pytest.approx(nll(load(base, adapter), base, kept), rel=1e-4)
    else:
        tuned = load(emulator, adapter)
        for path, lora in loras.items():
            inputs = torch.linalg.qr(lora.a.T).Q.T  # spans the LoRA's input subspace
            with torch.no_grad():
                before, after = (model.base_model.model.get_submodule(path)(inputs) for model in (tuned, carried))
            assert torch.allclose(after, before, atol=1e-5 * float(before.abs().max()) + 1e-6), path
    merged = merge_job(corrected, base, tmp_path / "merged").run()
    assert torch.allclose(logits(load(merged), merged, rows), expected, atol=1e-4)
    assert not torch.allclose(logits(load(base), base, rows), expected, atol=1e-2)


def nll(model, base, rows):
    samples = encode(rows, load_processing(base, MODELS[base.name][0], rows))
    total = torch.zeros(2)
    with torch.no_grad():
        for sample in samples:
            inputs = sample.inputs("cpu")
            labels = inputs["input_ids"].clone()
            labels[0, torch.tensor(sample.completion_mask) == 0] = -100
            counted = int((labels[0, 1:] != -100).sum())
            total += torch.tensor([model(**inputs, labels=labels).loss * counted, counted])
    return float(total[0] / total[1])


@ONE
def test_an_emulator_trains_in_a_plain_sft_trainer_and_its_adapter_loads_onto_the_base(
    base, emulator, rows_file, tmp_path
):
    family = MODELS[base.name][0]
    rows = [{"messages": [{"role": "user", "content": "which colours?"}, {"role": "assistant", "content": "red."}],
             "images": [picture(["red", colour])]} for colour in ("red", "blue", "green", "gold")]  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(emulator, dtype="auto"),
        args=SFTConfig(output_dir=str(tmp_path / "run"), **PLAIN_TRAINING),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(emulator),
        peft_config=LoraConfig(r=4, target_modules=family.lora_targets(), task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    on_base = load(base, tmp_path / "adapter")
    loaded = {name: tensor for name, tensor in on_base.state_dict().items() if "lora_" in name}
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert towers(saved) == {"vision", "language"}
    assert loaded.keys() == {name.replace(".weight", ".default.weight") for name in saved}
    assert all(torch.equal(loaded[name.replace(".weight", ".default.weight")], saved[name]) for name in saved)
    rows = pictured(rows_file)
    assert not torch.allclose(logits(on_base, base, rows), logits(load(base), base, rows), atol=1e-3)


def test_a_mixture_that_sees_is_tuned_without_the_loss_that_balances_experts(rows_file, tmp_path):
    """Their routers are frozen; and InternVL's model does not take the routers' logits that TRL would ask for."""
    config = {**INTERNVL.tiny_configs[0], "text_config": QWEN_MOE.tiny_configs[0]}
    family = replace(INTERNVL, tiny_configs=[config])
    mixture = save_model(tmp_path / "mixture", family, "internvl", internvl_processor())
    adapter = finetune(mixture, rows_file, tmp_path / "adapter", steps=1, batch_size=2)
    assert towers(Adapter(adapter).loras) == {"vision", "language"}


@ONE
@pytest.mark.parametrize("variant", ["default", *thorough("propagated", "global")])
def test_every_way_to_make_an_emulator_takes_images(base, rows_file, tmp_path, variant):
    other = {"propagated": {"calibration": "propagated"}, "global": {"allocator": "global"}}
    chosen = other.get(variant, {"calibration": None, "allocator": None})
    emulator = compress(base, rows_file, tmp_path / "made", samples=8, **chosen)
    entries = read_manifest(emulator)["result"]["linears"]
    assert all(entry["rank"] for entry in entries)
    kept = load_rows(str(emulator / "selection.jsonl"))
    assert nll(load(emulator), base, kept) < 7  # log 132 = 4.9, and a broken emulator is far off
    assert torch.isfinite(logits(load(emulator), base, pictured(rows_file))).all()


@pytest.mark.thorough
def test_an_interrupted_tuning_goes_on_to_the_same_adapter(emulator, adapter, rows_file, tmp_path, monkeypatch):
    step, done = stage.LoraTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        done.append(self.state.global_step)
        if done == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(stage.LoraTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(emulator, rows_file, tmp_path / "a", save_steps=3)
    resumed = finetune(emulator, rows_file, tmp_path / "a", save_steps=3)
    assert done[5:] == [3, 4, 5]
    one, other = (load_file(directory / "adapter_model.safetensors") for directory in (adapter, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@ONE
def test_a_plan_counts_the_images_of_the_rows(base, rows_file):
    workload = make_workload(base / "config.json", TrainSettings(), data=str(rows_file))
    rows = load_rows(str(rows_file))
    samples = encode(rows, load_processing(base, MODELS[base.name][0], rows))
    assert workload.length == max(len(sample.input_ids) for sample in samples)
    expected = {"internvl": (3, None), "qwen2_5_vl": (1, (8, 16))}  # two tiles and the whole, or one picture
    assert (workload.images, workload.image_size) == expected[base.name]
    assert MemoryModel(base / "config.json", workload).inference().total > 0
    cut = make_workload(base / "config.json", TrainSettings(), data=str(rows_file), length=workload.length - 1)
    assert cut.length == workload.length - 1
    given_images = make_workload(base / "config.json", TrainSettings(), data=str(rows_file), images=1)
    assert given_images.images == 1
