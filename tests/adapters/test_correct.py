"""Stage 3 on a real directory: adapters in, adapters out."""

import itertools
import json
import shutil

import pytest
import torch
from emloc_llama import LLAMA
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import TARGETS, delta, make_adapter
from support.jobs import compress_job, correct_job, merge_job
from support.marks import thorough
from support.rows import example_rows, write_jsonl
from transformers import AutoModelForCausalLM

import emloc_core.standins.quantizer  # noqa: F401  registers the emulator's loader
from emloc_core.adapters.adapter import Adapter, config_problems, content_hash
from emloc_core.adapters.candidates import CANDIDATES, choose, gains
from emloc_core.adapters.held_out import summed_loss
from emloc_core.algorithms.lora import Lora
from emloc_core.data.rows import load_rows
from emloc_core.data.tokenize import encode, load_processing
from emloc_core.errors import EmlocError
from emloc_core.evaluation.conversation import open_conversation
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.inputs import Inputs
from emloc_core.files.lora import CONFIG, WEIGHTS
from emloc_core.files.manifest import read_manifest
from emloc_core.model.opened import OpenModel
from emloc_core.settings import CompressSettings, CorrectSettings


@pytest.fixture(scope="module")
def emulator(tiny_emulator):
    return tiny_emulator


@pytest.fixture(scope="module")
def adapter(emulator, tmp_path_factory):
    return make_adapter(emulator, tmp_path_factory.mktemp("transfer") / "adapter")


def correct(adapter, base, output, clamp="none", **options):
    job = correct_job(adapter, base, output, CorrectSettings(clamp=clamp), **options)
    return job.run()


def scaled(adapter, factor, output):
    """Copy an adapter, with all of its output multiplied."""
    shutil.copytree(adapter, output)
    weights = load_file(adapter / WEIGHTS)
    save_file({key: part * factor if ".lora_B." in key else part for key, part in weights.items()}, output / WEIGHTS)
    return output


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 2},  # scale 0.5
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
        *thorough({"lora_alpha": 4}, {"lora_alpha": 8}, {"lora_alpha": 4, "use_rslora": True}),
    ],
)
def test_unclamped_the_base_answers_as_the_tuned_emulator_on_the_loras_subspace(
    tiny_model, emulator, tmp_path, options
):
    trained = make_adapter(emulator, tmp_path / "adapter", **options)
    corrected = correct(trained, tiny_model, tmp_path / "corrected")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(emulator, dtype="auto"), trained)
    carried = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto"), corrected)
    checked = 0
    with torch.no_grad():
        for path, module in tuned.named_modules():
            if path.rpartition(".")[2] in TARGETS and "lora" not in path:
                inputs = module.lora_A["default"].weight  # rows span the subspace
                expected, actual = module(inputs), carried.get_submodule(path)(inputs)
                assert torch.allclose(actual, expected, atol=1e-5 * float(expected.abs().max()) + 1e-6), path
                checked += 1
    assert checked == 21


def test_keys_are_those_of_a_lora_trained_on_the_base(tiny_model, adapter, tmp_path):
    on_base = make_adapter(tiny_model, tmp_path / "on_base")
    corrected = correct(adapter, tiny_model, tmp_path / "corrected")
    shapes = [
        {key: tuple(tensor.shape) for key, tensor in load_file(directory / WEIGHTS).items()}
        for directory in (on_base, adapter, corrected)
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_correcting_twice_is_refused_even_without_the_manifest(tiny_model, emulator, adapter, tmp_path):
    corrected = correct(adapter, tiny_model, tmp_path / "corrected")
    with pytest.raises(EmlocError, match="already corrected"):
        correct(corrected, tiny_model, tmp_path / "twice", emulator=emulator)
    (corrected / "emloc.json").unlink()
    with pytest.raises(EmlocError, match="already corrected"):
        correct(corrected, tiny_model, tmp_path / "twice", emulator=emulator)
    assert not (tmp_path / "twice").exists()


def test_the_input_is_left_as_it_was(tiny_model, adapter, tmp_path):
    before = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    correct(adapter, tiny_model, tmp_path / "corrected", clamp="auto")
    assert {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()} == before


def test_auto_reports_the_true_losses_and_keeps_the_best(tiny_model, emulator, adapter, tmp_path):
    corrected = correct(adapter, tiny_model, tmp_path / "corrected", clamp="auto")
    result = read_manifest(corrected)["result"]
    candidates = {(row["clamp"], row["scale"]): row["nll"] for row in result["candidates"]}
    clamps, scales = (0.3, 1, 3), (0.85, 1.15, 1.3, 1.5)
    assert list(candidates) == [(0, 1), *((clamp, 1) for clamp in clamps), *((0, scale) for scale in scales)]
    rows = load_rows(str(emulator / "selection.jsonl"))
    from transformers import AutoTokenizer

    from emloc_core.data.tokenize import encode

    samples = encode(rows, AutoTokenizer.from_pretrained(tiny_model))
    for (clamp, scale), reported in candidates.items():
        fixed = correct(adapter, tiny_model, tmp_path / f"fixed{clamp}", clamp=clamp)
        fixed = scaled(fixed, scale, tmp_path / f"scaled{clamp}-{scale}")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto"), fixed)
        total = tokens = 0.0
        with torch.no_grad():
            for sample in samples:
                inputs = sample.inputs("cpu")
                log_probs = model(**inputs).logits[0, :-1].log_softmax(-1)
                picked = log_probs.gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
                mask = torch.tensor(sample.completion_mask[1:], dtype=torch.bool)
                total -= float(picked[mask].sum())
                tokens += int(mask.sum())
        assert reported == pytest.approx(total / tokens, abs=1e-5), (clamp, scale)
    chosen = result["clamp"], result["scale"]
    sure = {(row["clamp"], row["scale"]): row["gain"] - 2 * row["gain_stderr"] for row in result["candidates"]}
    assert chosen == max(sure, key=sure.get)


def test_a_scale_that_wins_is_that_of_what_is_written(tiny_model, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("emloc_core.adapters.correct.choose", lambda losses: len(losses) - 1)
    corrected = correct(adapter, tiny_model, tmp_path / "corrected", clamp="auto")
    assert (read_manifest(corrected)["result"]["clamp"], read_manifest(corrected)["result"]["scale"]) == (0, 1.5)
    before, after = Adapter(adapter).loras, Adapter(corrected).loras
    for path, lora in after.items():
        assert torch.equal(lora.a, before[path].a)
        assert torch.allclose(delta(lora), 1.5 * delta(before[path]))


@pytest.mark.parametrize(
    "answer",
    [None, [], [None], [Lora(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)]],
)
def test_a_correction_that_gives_no_loras_is_named(tiny_model, adapter, tmp_path, answer):
    job = correct_job(adapter, tiny_model, tmp_path / "out", CorrectSettings(clamp=1.0))
    job.correct = lambda *_: answer
    with pytest.raises(
        EmlocError, match=r"correction 'emloc' did not return one LoRA per clamp.* on model\.layers\.0\.mlp\."
    ):
        job.run()
    assert not (tmp_path / "out").exists()


def test_a_correction_that_raises_is_named(tiny_model, adapter, tmp_path):
    job = correct_job(adapter, tiny_model, tmp_path / "out", CorrectSettings(clamp=1.0))
    job.correct = lambda *_: 1 // 0
    with pytest.raises(EmlocError, match=r"correction 'emloc', on model\.layers\.0\.\S+, failed \(ZeroDivisionError: "):
        job.run()


def test_uncorrected_is_kept_bit_for_bit(tiny_model, adapter, tmp_path):
    kept = correct(adapter, tiny_model, tmp_path / "kept", clamp=0)
    before, after = load_file(adapter / WEIGHTS), load_file(kept / WEIGHTS)
    assert all(torch.equal(before[key], after[key]) for key in before)


def losses_of(*gained):
    """Losses of an uncorrected LoRA, and of candidates that are better by so much on each row."""
    sums = 10 - torch.tensor([[0.0] * len(gained[0]), *gained])
    return torch.stack([sums, torch.ones_like(sums)], -1)


@pytest.mark.parametrize(
    ("gained", "expected"),
    [
        ([1.0, 1.1, 0.9, 1.0], 1),
        ([2.0, 0.5, 1.0, -0.3], 0),  # by more than one standard error, by less than two
        ([-1.0, -1.0, -1.0, -1.0], 0),
        ([0.0] * 4, 0),
        ([float("nan")] * 4, 0),
        ([float("-inf")] * 4, 0),
        ([1.0], 0),
    ],
)
def test_a_candidate_must_beat_uncorrected_by_more_than_chance(gained, expected):
    assert choose(losses_of(gained)) == expected


def test_a_sure_gain_is_worth_more_than_a_larger_one_that_may_be_chance():
    assert choose(losses_of([0.5, 0.6, 0.4, 0.5], [4.0, -0.5, 0.1, -0.2], [0.2, 0.2, 0.2, 0.2])) == 1


@given(st.integers(1, 4), st.integers(2, 12), st.integers(0, 10**6))
def test_what_is_chosen_gained_on_average(candidates, rows, seed):
    torch.manual_seed(seed)
    losses = losses_of(*torch.randn(candidates, rows).tolist())
    mean, error = gains(losses)
    assert torch.allclose(mean[1:], (losses[0, :, 0] - losses[1:, :, 0]).mean(1), atol=1e-6)
    assert mean[0] == error[0] == 0
    chosen = choose(losses)
    assert chosen == 0 or mean[chosen] > 2 * error[chosen]


def test_another_base_is_refused(tiny_model, adapter, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(EmlocError, match=r"a base other than .* with --base"):
        correct(adapter, other, tmp_path / "out")


def test_another_emulator_is_refused(tiny_model, adapter, tmp_path):
    trained = shutil.copytree(adapter, tmp_path / "adapter")
    manifest = {
        "kind": "adapter",
        "request": {"model": "0" * 64},
        "result": {"sha256": content_hash(trained)},
    }
    (trained / "emloc.json").write_text(json.dumps(manifest))
    with pytest.raises(EmlocError, match="an emulator other than"):
        correct(trained, tiny_model, tmp_path / "out")


def test_an_adapter_of_the_base_itself_needs_no_correction(tiny_model, tmp_path):
    on_base = make_adapter(tiny_model, tmp_path / "on_base")
    with pytest.raises(EmlocError, match="not an emulator"):
        correct(on_base, tiny_model, tmp_path / "out", emulator=tiny_model)


def named(adapter, name):
    """Make an adapter say that it was trained on another model."""
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": name}))
    return adapter


@pytest.mark.parametrize("name", [None, ""])
def test_an_adapter_that_names_no_model_needs_it_named(tiny_model, emulator, adapter, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tiny_model)
    nameless = named(shutil.copytree(adapter, tmp_path / "adapter"), name)
    for attempt in (
        lambda: correct(nameless, tiny_model, tmp_path / "out"),
        lambda: merge_job(nameless, None, tmp_path / "out"),
        lambda: open_conversation(str(nameless)),
    ):
        with pytest.raises(EmlocError, match="does not name the model") as raised:
            attempt()
        assert "--base" in raised.value.fix
    assert correct(nameless, tiny_model, tmp_path / "corrected", emulator=emulator)
    assert merge_job(nameless, tiny_model, tmp_path / "merged", allow_uncorrected=True).run()


@pytest.fixture
def hub(monkeypatch, tiny_model, emulator):
    models = {"org/base": tiny_model, "org/emulator": emulator}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(models[name]))


@pytest.mark.usefixtures("hub")
def test_an_adapter_of_a_base_on_the_hub_is_copied(tiny_model, tmp_path):
    adapter = named(make_adapter(tiny_model, tmp_path / "adapter"), "org/base")
    with pytest.raises(EmlocError, match="unknown whether") as raised:
        correct(adapter, None, tmp_path / "out")
    assert "--base org/base" in raised.value.fix
    copy = correct(adapter, "org/base", tmp_path / "copy")  # the user says what EMLoC's manifest would

    model = Checkpoint(tiny_model).fingerprint(Inputs(tmp_path))
    manifest = {"kind": "adapter", "request": {"model": model}, "result": {"sha256": content_hash(adapter)}}
    (adapter / "emloc.json").write_text(json.dumps(manifest))
    out = correct(adapter, None, tmp_path / "out")
    assert (out / WEIGHTS).read_bytes() == (copy / WEIGHTS).read_bytes()
    assert Adapter(out).model_name == "org/base"
    assert Adapter(out).is_corrected
    with pytest.raises(EmlocError, match="which is an emulator"):
        correct(named(adapter, "org/emulator"), None, tmp_path / "none")


def test_clamps_are_compared_on_the_answers_that_count_in_training(tiny_model, tmp_path):
    sentences = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
                 for row in example_rows()[:9]]  # fmt: skip
    rows = load_rows([{"messages": one + other} for one, other in itertools.pairwise(sentences)], loss="all")
    settings = CompressSettings(samples=4, selection=3, loss="all")
    emulator = compress_job(tiny_model, rows, tmp_path / "emulator", settings).run()
    trained = make_adapter(emulator, tmp_path / "adapter")
    job = correct_job(trained, tiny_model, tmp_path / "out", CorrectSettings())
    assert [row.loss for row in job.rows] == ["all"] * 3
    assert all("".join(map(str, sample.completion_mask)).count("01") == 2 for sample in job.samples)


def test_an_emulator_as_in_the_paper_has_its_clamp_unless_another_is_given(tiny_model, rows_file, tmp_path):
    settings = CompressSettings(paper=True, samples=4, selection=2)
    emulator = compress_job(tiny_model, rows_file, tmp_path / "emulator", settings).run()
    adapter = make_adapter(emulator, tmp_path / "adapter")
    for chosen, clamp in (({}, 3), ({"clamp": "none"}, "none"), ({"clamp": "auto"}, "auto")):
        job = correct_job(adapter, tiny_model, tmp_path / "out", CorrectSettings(**chosen))
        assert job.output.request["clamp"] == clamp


@pytest.mark.parametrize("overflowing", [0, -1])
def test_a_loss_that_is_not_finite_is_no_candidate(tiny_model, tiny_emulator, tmp_path, monkeypatch, overflowing):
    def choose_of(losses):
        losses[overflowing] = torch.nan
        return choose(losses)

    monkeypatch.setattr("emloc_core.adapters.correct.choose", choose_of)
    adapter = make_adapter(tiny_emulator, tmp_path / "adapter")
    if overflowing == 0:
        with pytest.raises(EmlocError, match="uncorrected LoRA is not finite"):
            correct(adapter, tiny_model, tmp_path / "out", clamp="auto")
        assert not (tmp_path / "out").exists()
        return
    result = read_manifest(correct(adapter, tiny_model, tmp_path / "out", clamp="auto"))["result"]
    assert len(result["candidates"]) == len(CANDIDATES) - 1


def test_auto_without_held_out_rows_says_what_to_do(tiny_model, rows_file, tmp_path):
    settings = CompressSettings(samples=12, selection=0, ratio=0.6)
    bare = compress_job(tiny_model, rows_file, tmp_path / "emulator", settings).run()
    adapter = make_adapter(bare, tmp_path / "adapter")
    with pytest.raises(EmlocError, match="--selection-data"):
        correct(adapter, tiny_model, tmp_path / "out", clamp="auto", emulator=bare)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "animal: cat.", "completion": " a red cat runs."}])
    done = correct(adapter, tiny_model, tmp_path / "out", clamp="auto", emulator=bare, selection_data=rows)
    result = read_manifest(done)["result"]
    assert (result["clamp"], result["scale"]) == (0, 1)  # what one row says may be chance
    assert [row["gain_stderr"] for row in result["candidates"]] == [0] + [None] * (len(result["candidates"]) - 1)
    assert {row["rows"] for row in result["candidates"]} == {1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True), ("init_lora_weights", "pissa"), ("bias", "all"),
        ("init_lora_weights", "olora"), ("lora_bias", True),
        ("peft_type", "IA3"), ("a_field_of_tomorrow", 1), ("kasa_config", {"beta": 1}), ("layer_replication", [[0, 2]]),
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_safe_is_refused(adapter, field, value):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config_problems(config) == []
    problems = config_problems({**config, field: value})
    assert len(problems) == 1
    assert str(value if field == "peft_type" else field) in problems[0]


def test_nan_in_an_adapter_names_the_tensor(tiny_model, adapter, tmp_path):
    spoilt = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(spoilt / WEIGHTS)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, spoilt / WEIGHTS)
    with pytest.raises(EmlocError, match=r"up_proj\.lora_B\.weight"):
        correct(spoilt, tiny_model, tmp_path / "out")


def test_a_model_that_computes_all_logits_has_the_same_loss(tiny_model):
    base = Checkpoint(tiny_model)
    skeleton, family = OpenModel(base, LLAMA).skeleton, LLAMA
    rows = load_rows(example_rows()[:4])
    samples = encode(rows, load_processing(tiny_model, family, rows))
    chosen = summed_loss(skeleton, samples, {}).tolist()
    forward = skeleton.model.forward

    def of_all_tokens(input_ids, **others):  # its signature has no way to leave any out
        return forward(input_ids, **others)

    skeleton.model.forward = of_all_tokens
    assert summed_loss(skeleton, samples, {}).tolist() == pytest.approx(chosen, rel=1e-5)
