"""Exact steps through TRL's trainer: as ordinary training, from an adapter or from the start, resumed bit for bit."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from emloc_internvl import INTERNVL
from emloc_llama import LLAMA
from emloc_qwen import QWEN_MOE
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import contents, make_adapter
from support.jobs import compress_job, correct_job, exact_job, merge_job, polish_job, train_job
from support.killed import kill, run_until_killed
from support.marks import thorough
from support.models import save_tiny_model
from support.rows import example_rows, write_jsonl
from support.vision_models import internvl_processor, picture_rows, save_model
from transformers import AutoModelForCausalLM

from emloc_core.adapters.adapter import Adapter
from emloc_core.errors import EmlocError
from emloc_core.exact import boundaries
from emloc_core.exact.steps import ExactSteps
from emloc_core.files.documents import read_json
from emloc_core.files.inputs import Inputs
from emloc_core.files.manifest import read_manifest
from emloc_core.model.overhead import overhead
from emloc_core.model.weights import FrozenWeights
from emloc_core.requests import make_request
from emloc_core.settings import CompressSettings, CorrectSettings, ExactSettings, PolishSettings, TrainSettings

LIMITS = ExactSettings()
STEPS = {"learning_rate": 0.02, "bf16": False, "logging_steps": 1, "seed": 3}


def train_settings(**changes) -> TrainSettings:
    return TrainSettings(**{"steps": 6, "lora_rank": 4, **STEPS, **changes})


def polish(adapter, base, rows, output, exclude=(), limits=None, **changes) -> Path:
    settings = PolishSettings(**{"steps": 6, "save_steps": 2, **STEPS, **changes})
    return polish_job(adapter, base, rows, output, settings, exclude=exclude, limits=limits or ExactSettings()).run()


def losses(directory):
    return [entry["loss"] for entry in read_json(directory / "log.json")]


def require_close(one, other, atol=2e-4):  # AdamW makes much of a gradient's last bits
    actual, wanted = (load_file(directory / "adapter_model.safetensors") for directory in (one, other))
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(actual[name], tensor, atol=atol), name


@pytest.fixture(scope="module")
def ordinary(tiny_model, rows_file, tmp_path_factory) -> Path:
    """An adapter of the tiny model by ordinary training."""
    output = tmp_path_factory.mktemp("ordinary") / "adapter"
    return train_job(tiny_model, rows_file, output, train_settings()).run()


@pytest.fixture(scope="module")
def polished(tiny_model, rows_file, tmp_path_factory) -> Path:
    """Six uninterrupted exact steps from a plain adapter with dropout."""
    adapter = make_adapter(tiny_model, tmp_path_factory.mktemp("plain") / "adapter", lora_dropout=0.2)
    return polish(adapter, tiny_model, rows_file, adapter.with_name("polished"))


@pytest.mark.parametrize(
    "sizes",
    [*thorough({"extra": {"accelerator_config": {"dispatch_batches": True}}}), {"batch_size": 2, "accumulation": 4}],
    ids=["dispatched", "small"],
)
def test_training_by_exact_steps_goes_as_ordinary_training(sizes, ordinary, tiny_model, rows_file, tmp_path):
    exact = exact_job(tiny_model, rows_file, tmp_path / "a", train_settings(**sizes)).run()
    assert losses(exact) == pytest.approx(losses(ordinary), rel=1e-5)
    require_close(exact, ordinary)
    assert read_json(exact / "adapter_config.json") == read_json(ordinary / "adapter_config.json")
    assert {path.name for path in exact.iterdir()} == {path.name for path in ordinary.iterdir()}
    assert read_manifest(exact)["request"]["exact"] is True


@pytest.mark.parametrize("kind", ["low-rank", *thorough("nf4", "trellis")])
def test_an_emulator_with_experts_is_streamed(kind, rows_file, tmp_path):
    base = save_tiny_model(QWEN_MOE.tiny_configs[0], tmp_path / "base")
    emulator = compress_job(base, rows_file, tmp_path / "emulator", CompressSettings(kind=kind, samples=8)).run()
    settings = train_settings(steps=2, learning_rate=0.5, extra={"optim": "sgd"})  # steps as large as gradients
    ordinary = train_job(emulator, rows_file, tmp_path / "ordinary", settings).run()
    exact = exact_job(emulator, rows_file, tmp_path / "exact", settings).run()
    assert losses(exact) == pytest.approx(losses(ordinary), rel=1e-5)
    require_close(exact, ordinary, atol=1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        "nf4",
        *thorough("low-rank", "low-rank-nf4", "trellis"),
    ],
)
def test_an_emulator_is_streamed_to_the_same_result(kind, rows_file, tmp_path):
    # Kernels of bitsandbytes on a CPU unpack rows wrongly that end in half a block of 64.
    base = save_tiny_model({**LLAMA.tiny_configs[0], "hidden_size": 64, "head_dim": 16}, tmp_path / "base")
    sized = {"ratio": 0.3} if kind == "1.6-bit+repair" else {}
    compress_settings = CompressSettings(kind=kind, samples=8, selection=4, **sized)
    emulator = compress_job(base, rows_file, tmp_path / "emulator", compress_settings).run()
    ordinary = train_job(emulator, rows_file, tmp_path / "ordinary", train_settings(steps=3)).run()
    job = exact_job(emulator, rows_file, tmp_path / "exact", train_settings(steps=3, batch_size=2, accumulation=4))
    exact = job.run()
    assert losses(exact) == pytest.approx(losses(ordinary), rel=1e-5)
    require_close(exact, ordinary)
    corrected = correct_job(exact, base, tmp_path / "corrected", CorrectSettings(clamp=3)).run()
    assert Adapter(corrected).is_corrected


@pytest.fixture(scope="module")
def four_bits(tiny_model, rows_file, tmp_path_factory) -> Path:
    """An emulator of the tiny model in four bits."""
    output = tmp_path_factory.mktemp("four-bits") / "emulator"
    return compress_job(tiny_model, rows_file, output, CompressSettings(kind="nf4", keep="head")).run()


@pytest.mark.parametrize(
    "changes", [{"bnb_4bit_use_double_quant": False}, {"bnb_4bit_quant_type": "fp4"}, {"load_in_4bit": False}]
)
def test_other_four_bits_are_not_streamed(changes, four_bits, rows_file, tmp_path):
    emulator = shutil.copytree(four_bits, tmp_path / "emulator")
    config = read_json(emulator / "config.json")
    config["quantization_config"] |= changes
    (emulator / "config.json").write_text(json.dumps(config))
    with pytest.raises(EmlocError, match=next(iter(changes))) as caught:
        exact_job(emulator, rows_file, tmp_path / "exact", train_settings())
    assert caught.value.code == "unsupported"


def test_a_model_quantised_by_another_tool_is_refused(tiny_model, rows_file, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "fp8")
    config = read_json(model / "config.json") | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(config))
    # Its weights are floating-point numbers, which without their scales make another model of the same shape.
    weights = load_file(model / "model.safetensors")
    small = {name: tensor.to(torch.float8_e4m3fn) if "proj" in name else tensor for name, tensor in weights.items()}
    save_file(small, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(EmlocError, match="quantised") as caught:
        exact_job(model, rows_file, tmp_path / "exact", train_settings())
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"blocksize": 128}, "blocksize is 128, not 64"),
        ({"quant_type": "fp4"}, "quant_type is 'fp4'"),
        ({"nested_offset": 1e39}, "NaN or Inf"),
        ({"nested_offset": "0.1"}, "weight_ranges cannot be made"),
        (None, "weight_ranges cannot be made"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_four_bits_that_say_something_else_are_not_streamed(change, reason, four_bits, rows_file, tmp_path):
    emulator = shutil.copytree(four_bits, tmp_path / "emulator")
    shard = sorted(emulator.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    key = next(key for key in tensors if "quant_state" in key)
    state = json.dumps({**json.loads(bytes(tensors[key].tolist())), **change}) if change else "{"
    save_file({**tensors, key: torch.tensor(list(state.encode()), dtype=torch.uint8)}, shard, {"format": "pt"})
    (emulator / "emloc.json").unlink()  # as a stranger's
    with pytest.raises(EmlocError, match=reason) as caught:
        exact_job(emulator, rows_file, tmp_path / "exact", train_settings(steps=1)).run()
    assert caught.value.code == "damaged"


@pytest.mark.thorough
def test_rows_with_pictures_are_trained_on_as_ordinarily(tmp_path):
    base = save_model(tmp_path / "base", INTERNVL, "internvl", internvl_processor())
    rows = picture_rows(tmp_path / "rows")
    one = exact_job(base, rows, tmp_path / "one", train_settings(steps=2, batch_size=2, accumulation=2)).run()
    other = train_job(base, rows, tmp_path / "other", train_settings(steps=2, batch_size=4)).run()
    assert losses(one) == pytest.approx(losses(other), rel=1e-4)
    require_close(one, other)


def test_polish_keeps_targets_that_are_a_pattern(tiny_model, rows_file, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", target_modules=r".*\.(q_proj|v_proj)")
    output = polish(adapter, tiny_model, rows_file, tmp_path / "polished", steps=1)
    assert read_json(output / "adapter_config.json")["target_modules"] == r".*\.(q_proj|v_proj)"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), output)
    assert sum("lora_A" in name for name, _ in loaded.named_modules()) > 0


def test_polish_takes_half_of_the_learning_rate_of_tuning(ordinary, tiny_model, rows_file, tmp_path):
    def rate(directory):
        return read_manifest(directory)["request"]["settings"]["learning_rate"]

    once = polish(ordinary, tiny_model, rows_file, tmp_path / "once", learning_rate=None, steps=1)
    assert rate(once) == STEPS["learning_rate"] / 2
    assert rate(polish(once, tiny_model, rows_file, tmp_path / "twice", learning_rate=None, steps=1)) == rate(once)
    plain = make_adapter(tiny_model, tmp_path / "plain")
    assert rate(polish(plain, tiny_model, rows_file, tmp_path / "polished", learning_rate=None, steps=1)) == 1e-2 / 8


def test_polish_goes_on_from_what_train_and_correct_make(tiny_model, tiny_emulator, rows_file, tmp_path):
    tuned = train_job(tiny_emulator, rows_file, tmp_path / "tuned", train_settings()).run()
    corrected = tmp_path / "corrected"
    correct_job(tuned, tiny_model, corrected, CorrectSettings(clamp=1)).run()
    before = contents(corrected)
    for adapter in (tuned, corrected):
        output = polish(adapter, tiny_model, rows_file, tmp_path / f"polished-{adapter.name}", learning_rate=1e-6)
        trained, start = Adapter(output), Adapter(adapter)
        for path, lora in start.loras.items():  # six very small steps away
            for one, other in ((trained.loras[path].a, lora.a), (trained.loras[path].b, lora.b)):
                assert 0 < (one - other).abs().max() < 1e-5, path
        for name in ("r", "lora_alpha", "target_modules"):
            assert trained.config[name] == start.config[name]
        assert trained.config["base_model_name_or_path"] == str(tiny_model.absolute())
        assert not trained.is_corrected
        merge_job(trained, tiny_model, tmp_path / f"merged-{adapter.name}").run()
    assert contents(corrected) == before  # as it was


def test_the_same_again_does_nothing_and_limits_change_no_result(
    polished, tiny_model, rows_file, tmp_path, monkeypatch
):
    adapter = polished.with_name("adapter")
    limits = ExactSettings(memory="1GiB", park="disk")
    monkeypatch.setattr("emloc_core.exact.boundaries._SMALL", 0)
    again = polish(adapter, tiny_model, rows_file, tmp_path / "again", limits=limits, batch_size=8, save_steps=9)
    one, other = ((directory / "adapter_model.safetensors").read_bytes() for directory in (again, polished))
    assert one == other
    bytes_read = [read_json(directory / "timing.json")["read_bytes"] for directory in (again, polished)]
    assert bytes_read[0] * 6 < bytes_read[1]
    monkeypatch.setattr(ExactSteps, "loss", lambda *_, **__: pytest.fail("took a step"))
    assert polish(adapter, tiny_model, rows_file, polished, limits=limits) == polished
    with pytest.raises(EmlocError, match=r"settings\.learning_rate was 0\.02 and is now 0\.1"):
        polish(adapter, tiny_model, rows_file, polished, learning_rate=0.1)


def test_the_lora_the_process_and_boundaries_in_memory_count(tiny_model, rows_file, tmp_path, monkeypatch):
    rooms, parameters = [], []

    def followed(skeleton, units, device, room, pinned):
        rooms.append(room)
        return FrozenWeights(skeleton, units, device, room, pinned)

    monkeypatch.setattr("emloc_core.exact.steps.FrozenWeights", followed)
    for rank, park in ((4, "memory"), (8, "memory"), (8, "disk")):
        settings = train_settings(steps=1, lora_rank=rank)
        job = exact_job(
            tiny_model, rows_file, tmp_path / f"{rank}-{park}", settings, limits=ExactSettings(memory="1GiB", park=park)
        )
        adapter = job.run()
        parameters.append(sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values()))
    assert rooms[0] - rooms[1] == 16 * (parameters[1] - parameters[0]) > 0  # values, gradients, two moments
    assert rooms[0] + 16 * parameters[0] < (1 << 30) - overhead("cpu", tuning=True)
    assert rooms[2] - rooms[1] == job._need()["boundaries"] > 0


def run_until(step, park, adapter, base, rows, output):
    """Polish until the process kills itself in a step."""
    exact_loss, steps_taken = ExactSteps.loss, []

    def loss(self, *args, **options):
        steps_taken.append(1)
        return kill() if len(steps_taken) == step else exact_loss(self, *args, **options)

    ExactSteps.loss = loss
    boundaries._SMALL = 0
    polish(adapter, base, rows, output, limits=ExactSettings(park=park))


@pytest.mark.parametrize(
    ("step", "remaining", "park"),
    [
        *thorough((1, 6, "memory")),
        (4, 4, "disk"),
        *thorough((6, 2, "disk")),
    ],
)
def test_killed_at_any_step_it_resumes_bit_for_bit(
    step, remaining, park, polished, tiny_model, rows_file, tmp_path, monkeypatch
):
    adapter, output = polished.with_name("adapter"), tmp_path / "polished"
    run_until_killed(run_until, step, park, adapter, tiny_model, rows_file, output)
    assert not output.exists()
    steps_taken, exact_loss = [], ExactSteps.loss
    monkeypatch.setattr(
        ExactSteps, "loss", lambda *args, **options: (steps_taken.append(1), exact_loss(*args, **options))[1]
    )
    polish(adapter, tiny_model, rows_file, output, limits=ExactSettings(park=park))
    assert len(steps_taken) == remaining
    expected = contents(polished)
    assert contents(output) == expected
    assert not output.with_name(".polished.partial").exists()


# The command line


def test_the_commands(emloc, ordinary, tiny_model, rows_file, tmp_path):
    argv = [ordinary, "--base", tiny_model, "--data", rows_file, "-o", tmp_path / "p", "--steps", 2, "--lr", 0.01]
    code, out, _ = emloc("polish", *argv, "--dry-run", "--json")
    plan = json.loads(out)
    assert (code, plan["steps"], plan["rows"]) == (0, 2, 120)
    assert tiny_model.joinpath("model.safetensors").stat().st_size < plan["step_read_bytes"] < 2 * plan["model_bytes"]
    assert not (tmp_path / "p").exists()
    code, out, err = emloc("polish", *argv, "--set", "lr_scheduler_type=cosine", "--json")
    answer = json.loads(out)
    assert (code, answer["kind"], answer["result"]["steps"]) == (0, "adapter", 2)
    assert answer["request"]["adapter"] == Adapter(ordinary).fingerprint(Inputs())
    assert answer["timing"]["read_bytes"] > 0
    assert "Polishing: 2 of 2" in err
    code, out, _ = emloc("train", tiny_model, "--data", rows_file, "-o", tmp_path / "t", "--steps", 1, "--exact",
                         "--memory", "2GiB")  # fmt: skip
    assert code == 0
    assert "of weights read" in out


# Mistakes


@pytest.mark.parametrize("limit", [("--memory", "2GiB"), ("--park", "disk")])
def test_limits_of_exact_steps_are_not_ignored_without_them(limit, emloc, tiny_model, rows_file, tmp_path):
    code, _, err = emloc("train", tiny_model, "--data", rows_file, "-o", tmp_path / "t", *limit)
    assert code != 0
    assert f"{limit[0].removeprefix('--')} has no effect without exact" in err
    with pytest.raises(EmlocError, match="no effect without exact"):
        make_request("train", model="m", data="d", output="o", limits={limit[0].removeprefix("--"): limit[1]})


def other_base(tiny_model, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(9)
        model = save_tiny_model(json.loads((tiny_model / "config.json").read_text()), tmp_path / "other")
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    return model


def test_what_does_not_belong_together_is_refused(ordinary, tiny_model, tiny_emulator, rows_file, tmp_path):
    with pytest.raises(EmlocError, match=r"was made for a base other than .*: the fingerprints differ"):
        polish(ordinary, other_base(tiny_model, tmp_path), rows_file, tmp_path / "a")
    config = json.loads((tiny_model / "config.json").read_text())
    narrow = save_tiny_model({**config, "intermediate_size": 24}, tmp_path / "narrow")
    with pytest.raises(EmlocError, match=r"The LoRA on .*mlp.* is for a weight of shape"):
        polish(ordinary, narrow, rows_file, tmp_path / "a")
    shallow = save_tiny_model({**config, "num_hidden_layers": 1}, tmp_path / "shallow")
    with pytest.raises(EmlocError, match=r"The base has no Linear at model\.layers\.1"):
        polish(ordinary, shallow, rows_file, tmp_path / "a")
    with pytest.raises(EmlocError, match="is already quantised or an emulator"):
        polish(ordinary, tiny_emulator, rows_file, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / ".a.partial").exists()


def test_a_base_that_changes_meanwhile_ends_the_run_and_its_checkpoint_is_kept(
    ordinary, tiny_model, rows_file, tmp_path, monkeypatch
):
    exact_loss, steps_taken = ExactSteps.loss, []
    weights = tiny_model / "model.safetensors"
    before = weights.stat()

    def loss(self, *args, **options):
        steps_taken.append(1)
        if len(steps_taken) == 4:
            os.utime(weights)
        return exact_loss(self, *args, **options)

    monkeypatch.setattr(ExactSteps, "loss", loss)
    with pytest.raises(EmlocError, match=r"model\.safetensors has changed since it was first read"):
        polish(ordinary, tiny_model, rows_file, tmp_path / "a")
    assert list(tmp_path.rglob(".a.partial/**/checkpoint-2"))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # restored
    polish(ordinary, tiny_model, rows_file, tmp_path / "a")
    assert len(steps_taken) == 4 + 4


def test_rows_without_answers_and_rows_that_fill_memory_are_refused(
    ordinary, tiny_model, rows_file, tmp_path, monkeypatch
):
    with pytest.raises(EmlocError, match="Every row's prompt alone fills the 3 tokens"):
        polish(ordinary, tiny_model, rows_file, tmp_path / "a", max_length=3)
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"prompt": row["prompt"]} for row in example_rows()])
    with pytest.raises(EmlocError, match=r"empty\.jsonl, row 1: has the columns \['prompt'\]"):
        polish(ordinary, tiny_model, empty, tmp_path / "a")
    monkeypatch.setattr("emloc_core.model.device.within_group", lambda _, total: (1000, total))  # in a container
    with pytest.raises(EmlocError, match=r"keeps .* at block boundaries, but only 1 kB of memory is free.*--park disk"):
        polish(ordinary, tiny_model, rows_file, tmp_path / "a")
    polish(ordinary, tiny_model, rows_file, tmp_path / "a", limits=ExactSettings(park="disk"), steps=1)


def test_a_lora_on_the_output_layer_is_refused(tiny_model, rows_file, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(EmlocError, match="has a LoRA on lm_head, which exact steps do not train"):
        polish(adapter, tiny_model, rows_file, tmp_path / "a")


def test_without_memory_it_is_told_what_exact_steps_can_do(ordinary, tiny_model, rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr(ExactSteps, "loss", mock.Mock(side_effect=MemoryError))
    with pytest.raises(
        EmlocError, match=r"at step 1\. .* a smaller batch and more accumulation, or a maximum length\."
    ):
        polish(ordinary, tiny_model, rows_file, tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"extra": {"loss_type": "dft"}}, "Exact steps do not support loss_type"),
        ({"extra": {"max_steps": 3}}, "Give steps directly"),
        ({"learning_rate": 1e30}, r"The loss at step \d+ is nan"),
    ],
)
def test_settings_that_cannot_work_are_one_error(changes, complaint, ordinary, tiny_model, rows_file, tmp_path):
    with pytest.raises(EmlocError, match=complaint):
        polish(ordinary, tiny_model, rows_file, tmp_path / "a", **changes)
    assert not (tmp_path / "a").exists()
