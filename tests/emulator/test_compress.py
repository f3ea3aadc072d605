"""The emulator: what is written, that it loads like any checkpoint, and that full rank is the base."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emloc_llama import LLAMA
from safetensors.torch import load_file, save_file
from support.jobs import compress_job
from support.models import CHAT_TEMPLATE
from support.ranks import plan_ranks
from support.rows import example_rows, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM

import emloc_core.standins.quantizer
from emloc_core.algorithms.factorize import Factors
from emloc_core.algorithms.statistics import Gram
from emloc_core.data.row import Row
from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.manifest import read_manifest
from emloc_core.model.hooks import tapped
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import CompressSettings
from emloc_core.standins.low_rank import LowRank, LowRankLinear

SETTINGS = CompressSettings(samples=12, selection=6, ratio=0.6, calibration="base", allocator="uniform")


def compress(model, rows_file, output, settings=SETTINGS):
    return compress_job(model, rows_file, output, settings).run()


@pytest.fixture(scope="session")
def emulator(tiny_model, rows_file, tmp_path_factory):
    return compress(tiny_model, rows_file, tmp_path_factory.mktemp("emulators") / "emulator")


def test_loads_with_plain_transformers_at_the_planned_ranks(emulator):
    model = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto")
    config = json.loads((emulator / "config.json").read_text())["quantization_config"]
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert {path: layer.rank for path, layer in layers.items()} == config["ranks"]
    assert len(layers) == 21
    q = layers["model.layers.0.self_attn.q_proj"]
    assert (q.rank, q.in_features, q.out_features) == (int(0.6 * 32 * 32 / 64), 32, 32)


def test_what_another_declaration_made_is_refused(tiny_model, rows_file, emulator, monkeypatch):
    family = replace(LLAMA, keep_dense={**LLAMA.keep_dense, "*.o_proj": "for this test"})
    monkeypatch.setattr(plugin_manager(), "family_for", lambda _: family)
    with pytest.raises(EmlocError, match="was made from something else: what the family's plugin declares changed"):
        compress_job(tiny_model, rows_file, emulator, SETTINGS).output.is_finished()


@pytest.mark.parametrize("kind", ["trellis", "low-rank"])
def test_the_planned_bytes_are_right_where_the_base_is_stored_in_another_dtype(kind, tiny_model, rows_file, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    chosen = CompressSettings(kind=kind, samples=4, selection=2, calibration="base")
    job = compress_job(base, rows_file, tmp_path / "emulator", chosen)
    assert job.describe()["emulator_bytes"] == Checkpoint(job.run()).nbytes


def test_all_linears_in_a_module_that_is_kept_dense_stay_dense(tiny_model, rows_file, tmp_path, monkeypatch):
    family = replace(LLAMA, keep_dense={**LLAMA.keep_dense, "model.layers.1.mlp": "for this test"})
    monkeypatch.setattr(plugin_manager(), "family_for", lambda _: family)
    job = compress_job(tiny_model, rows_file, tmp_path / "emulator", SETTINGS)
    dense = {linear.path: linear.reason for linear in job.plan.linears if not linear.is_replaced}
    assert dense == {f"model.layers.1.mlp.{name}_proj": "for this test" for name in ("gate", "up", "down")}


def test_reported_errors_are_the_true_ones(tiny_model, rows_file, emulator):
    job = compress_job(tiny_model, rows_file, emulator, SETTINGS)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto").eval()
    small = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto")
    reported = {row["path"]: row["relative_error"] for row in read_manifest(emulator)["result"]["linears"]}
    seen = {path: [] for path in reported}
    taps = dict.fromkeys(reported, "input")
    modules = {path: base.get_submodule(path) for path in reported}
    with torch.no_grad(), tapped(modules, taps, lambda path, x: seen[path].append(x[0].double())):
        for sample in job.samples:
            base(**sample.inputs("cpu"))
    for path, error in reported.items():
        inputs, layer = torch.cat(seen[path]), small.get_submodule(path)
        exact = inputs @ base.get_submodule(path).weight.double().T
        emulated = inputs @ layer.V.double().T @ layer.weight.double().T
        assert error == pytest.approx(float((exact - emulated).norm() / exact.norm()), rel=1e-4)


def test_full_rank_in_memory_equals_the_base(tiny_model):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto").eval()
    full = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto").eval()
    plan = plan_ranks(base, LLAMA, 0.5)
    taps = {linear.path: linear.tap for linear in plan.linears}
    grams = {
        linear.path: Gram(linear.tap, linear.out_features if linear.tap == "output" else linear.in_features)
        for linear in plan.linears
    }
    ids = torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(1))
    modules = {path: base.get_submodule(path) for path in taps}
    with torch.no_grad():
        with tapped(modules, taps, lambda path, x: grams[path].add(x)):
            base(input_ids=ids)
        ranks = {linear.path: min(linear.out_features, linear.in_features) for linear in plan.linears}
        LowRank().replace(full, ranks)
        for path, rank in ranks.items():
            factors = emloc_core.algorithms.factorize.factorize(base.get_submodule(path).weight, grams[path], rank)
            full.get_submodule(path).weight.copy_(factors.u)
            full.get_submodule(path).V.copy_(factors.v)
        assert (base(input_ids=ids).logits - full(input_ids=ids).logits).abs().max() < 1e-4


def test_other_tensors_and_files_are_those_of_the_base(tiny_model, emulator):
    base, small = Checkpoint(tiny_model), Checkpoint(emulator)
    originals = load_file(tiny_model / "model.safetensors")
    kept = [key for key in base.tensors if "proj" not in key]
    assert kept
    with small.slices(kept) as slices:
        for key in kept:
            assert torch.equal(slices[key][...], originals[key])
    assert (emulator / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()


def test_held_out_rows_are_kept_beside_it_and_disjoint(emulator, rows_file):
    calibration = {row.key for row in load_rows(str(emulator / "calibration.jsonl"))}
    selection = {row.key for row in load_rows(str(emulator / "selection.jsonl"))}
    assert (len(calibration), len(selection), len(calibration & selection)) == (12, 6, 0)
    assert calibration | selection <= {row.key for row in load_rows(str(rows_file))}


def test_of_few_rows_fewer_are_kept_unless_asked(tiny_model):
    def job(count: int, **settings):
        rows = [Row(number, **row) for number, row in enumerate(example_rows()[:count], start=1)]
        compression = compress_job(tiny_model, rows, Path("nowhere"), CompressSettings(**settings))
        return [
            len(part) for part in (compression.rows.calibration, compression.rows.selection, compression.rows.tuning)
        ], compression.warnings

    sizes, warnings = job(20)
    assert sizes == [6, 3, 11]
    assert any(
        "6 are set aside for calibration and 3 for choosing" in warning and "--selection" in warning
        for warning in warnings
    )
    assert job(20, samples=4, selection=2) == ([4, 2, 14], [])
    assert job(2)[0] == [1, 1, 0]
    with pytest.raises(
        EmlocError, match=r"2 distinct rows are .* have 1 besides excluded ones.*--samples, --selection"
    ):
        job(1)


def test_the_same_request_gives_the_same_bytes_and_is_not_done_twice(tiny_model, rows_file, emulator, tmp_path):
    again = compress(tiny_model, rows_file, tmp_path / "again")
    for path in emulator.iterdir():
        if path.name != "timing.json":
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    before = (again / "timing.json").stat().st_mtime_ns
    compress(tiny_model, rows_file, again)
    assert (again / "timing.json").stat().st_mtime_ns == before


def test_another_request_does_not_overwrite(tiny_model, rows_file, emulator):
    with pytest.raises(EmlocError, match=r"settings\.ratio was 0\.6 and is now 0\.3"):
        compress(tiny_model, rows_file, emulator, SETTINGS.model_copy(update={"ratio": 0.3}))


def test_another_tokenization_of_the_same_rows_is_another_request(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    turns = [{"role": "user", "content": "animal: cat."}, {"role": "assistant", "content": "a red cat runs."}]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])

    def job():
        settings = CompressSettings(samples=1, selection=0)
        return compress_job(model, rows, tmp_path / "emulator", settings)

    job().run()
    (model / "README.md").write_text("Not the model's business.")
    assert job().output.is_finished()
    (model / "chat_template.jinja").write_text(f"the {CHAT_TEMPLATE}")
    with pytest.raises(EmlocError, match="what the tokenizer makes of the rows changed"):
        job().run()


def test_a_foreign_directory_is_refused(tiny_model, rows_file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EmlocError, match="not written by emloc"):
        compress(tiny_model, rows_file, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["notes.txt"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_stay_half(tiny_model, rows_file, tmp_path, dtype):
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "half" / name).write_bytes((tiny_model / name).read_bytes())
    small = compress(tmp_path / "half", rows_file, tmp_path / "emulator")
    model = AutoModelForCausalLM.from_pretrained(small, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    errors = [row["relative_error"] for row in read_manifest(small)["result"]["linears"]]
    assert max(errors) < 0.6


def test_tied_embeddings_and_biases_survive(tiny_model, rows_file, tmp_path):
    options = dict(LLAMA.tiny_configs[0]) | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "base" / name).write_bytes((tiny_model / name).read_bytes())
    small = compress(tmp_path / "base", rows_file, tmp_path / "emulator", SETTINGS.model_copy(update={"ratio": 0.95}))
    loaded = AutoModelForCausalLM.from_pretrained(small, dtype="auto")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    layer = loaded.model.layers[1].mlp.down_proj
    assert torch.equal(layer.bias, model.model.layers[1].mlp.down_proj.bias)
    ids = torch.tensor([[1, 9, 30, 44, 80]])
    with torch.no_grad():
        assert (loaded(ids).logits - model(ids).logits).norm() / model(ids).logits.norm() < 0.5


def damaged(tiny_model, tmp_path, change):
    directory = tmp_path / "damaged"
    directory.mkdir()
    for path in tiny_model.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    change(directory)
    return directory


def test_nan_in_a_weight_names_the_layer(tiny_model, rows_file, tmp_path):
    def spoil(directory):
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    model = damaged(tiny_model, tmp_path, spoil)
    with pytest.raises(EmlocError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* NaN"):
        compress(model, rows_file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".emloc-hashes.json", "damaged"]


@pytest.mark.parametrize("kind", ["nf4", "low-rank-nf4"])
def test_weights_too_large_for_their_error_are_refused(tiny_model, rows_file, tmp_path, kind):
    def spoil(directory):
        tensors = load_file(directory / "model.safetensors")
        save_file(
            {name: tensor * 1e38 for name, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"}
        )

    model, chosen = damaged(tiny_model, tmp_path, spoil), CompressSettings(kind=kind, samples=12, selection=6)
    with pytest.raises(EmlocError, match=rf"The kind '{kind}' gave model\.\S+ an error of nan: numbers there are"):
        compress_job(model, rows_file, tmp_path / "out", chosen).run()


def wrong_shape(weight, _gram, rank):
    return Factors(weight[:, : rank + 1], weight[: rank + 1], torch.ones(1))


def no_numbers(weight, _gram, rank):
    return Factors(weight[:, :rank] * float("nan"), weight[:rank], torch.ones(1))


@pytest.mark.parametrize("calibration", ["base", "propagated"])
@pytest.mark.parametrize("factorize", [wrong_shape, no_numbers])
def test_a_factorizer_that_gives_no_factors_is_named(tiny_model, rows_file, tmp_path, calibration, factorize):
    settings = SETTINGS.model_copy(update={"calibration": calibration})
    job = compress_job(tiny_model, rows_file, tmp_path / "out", settings)
    job.format.factorize = factorize
    with pytest.raises(EmlocError, match=r"'low-rank' gave model\.layers\.0\.\S+ (\{'weight'|NaN or Inf)"):
        job.run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("calibration", ["base", "propagated"])
def test_a_factorizer_that_raises_is_named(tiny_model, rows_file, tmp_path, calibration):
    settings = SETTINGS.model_copy(update={"calibration": calibration})
    job = compress_job(tiny_model, rows_file, tmp_path / "out", settings)
    job.format.factorize = lambda *_: 1 // 0
    with pytest.raises(EmlocError, match=r"kind 'low-rank', on \S+, failed \(ZeroDivisionError: "):
        job.run()


def test_overflow_in_activations_names_layer_and_row(tiny_model, rows_file, tmp_path):
    def spoil(directory):
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
        tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e38
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    model, more = damaged(tiny_model, tmp_path, spoil), write_jsonl(tmp_path / "more.jsonl", example_rows()[:1])
    with pytest.raises(EmlocError, match=r"Row \d+ of .+: NaN .+ activations of model\.layers\.1\.mlp\.down_proj"):
        compress(model, [str(rows_file), str(more)], tmp_path / "out")


def test_a_missing_factor_is_found_when_loading(emulator, tmp_path):
    def drop(directory):
        shard = directory / "model-00001-of-00004.safetensors"
        tensors = load_file(shard)
        del tensors["model.layers.0.mlp.up_proj.V"]
        save_file(tensors, shard, {"format": "pt"})
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        del index["weight_map"]["model.layers.0.mlp.up_proj.V"]
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    broken = damaged(emulator, tmp_path, drop)
    with pytest.raises(EmlocError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.V"):
        AutoModelForCausalLM.from_pretrained(broken, dtype="auto")


def test_dequantize_gives_ordinary_linears_with_the_same_outputs(emulator):
    model = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto").eval()
    ids = torch.tensor([[1, 9, 30, 44, 80]])
    with torch.no_grad():
        before = model(ids).logits
        model.dequantize()
        assert not any(isinstance(module, LowRankLinear) for module in model.modules())
        assert torch.allclose(model(ids).logits, before, atol=1e-5)


def test_saved_again_it_loads_again(emulator, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto")
    model.save_pretrained(tmp_path / "copy")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype="auto")
    for (name, one), (_, other) in zip(model.named_parameters(), copy.named_parameters(), strict=True):
        assert torch.equal(one, other), name
