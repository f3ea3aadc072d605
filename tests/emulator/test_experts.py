"""Fused experts as factors, on a tiny Qwen3-MoE: from their statistics to the merged model."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from emloc_qwen import QWEN_MOE
from safetensors.torch import load_file, save_file
from support.jobs import compress_job, correct_job, merge_job, train_job
from support.marks import most_thorough
from support.models import save_tiny_model
from support.ranks import plan_ranks
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoePreTrainedModel, Qwen3MoeSparseMoeBlock

from emloc_core.adapters.adapter import Adapter
from emloc_core.algorithms.factorize import factorize
from emloc_core.algorithms.statistics import Gram
from emloc_core.emulator.declared import find_linears
from emloc_core.emulator.experts import ExpertFitting
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.manifest import read_manifest
from emloc_core.files.pretrained import load_lora
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import Workload
from emloc_core.settings import CompressSettings, CorrectSettings, TrainSettings
from emloc_core.standins import LowRank
from emloc_core.standins.experts import StandInExperts, activate, stacks
from emloc_core.standins.format import kind_of
from emloc_core.standins.registry import format_named

SETTINGS = {**QWEN_MOE.tiny_configs[0], "num_experts": 6}
STACKS = [f"model.layers.{index}.mlp.experts.{name}_proj" for index in (1, 2) for name in ("gate_up", "down")]
IDS = torch.arange(5, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(SETTINGS, tmp_path_factory.mktemp("models") / "moe")


def loaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def compression(base, rows, output, **settings):
    chosen = CompressSettings(**{"ratio": 0.6, "samples": 12, "selection": 6, **settings})
    return compress_job(base, rows, output, chosen)


@pytest.fixture(scope="module")
def emulator(base, rows_file, tmp_path_factory):
    return compression(base, rows_file, tmp_path_factory.mktemp("emulator") / "emulator").run()


KINDS = most_thorough(["nf4", "trellis", "low-rank-nf4"], "trellis")


@pytest.fixture(scope="module", params=KINDS)
def packed(request, base, rows_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("packed") / "emulator"
    return compress_job(base, rows_file, output, CompressSettings(kind=request.param, samples=12, selection=6)).run()


def planned(model):
    """Return the plan of the stacks of the model's second layer."""
    plan = plan_ranks(model, QWEN_MOE, 0.6)
    return plan.experts_in_block("model.layers.1")["model.layers.1.mlp.experts"]


def product_of(stacked, expert):
    return stacked.parts["weight"][expert] @ stacked.parts["V"][expert]


def test_factors_of_full_rank_are_the_experts(base):
    model = loaded(base)
    full = copy.deepcopy(model)
    LowRank().replace(full, {path: min(model.get_parameter(path).shape[1:]) for path in STACKS})
    for path in STACKS:
        owner, _, name = path.rpartition(".")
        experts = full.get_submodule(owner)
        u, s, v = torch.linalg.svd(model.get_parameter(path), full_matrices=False)
        experts.weight[name].copy_(u * s[:, None])
        experts.V[name].copy_(v)
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.allclose(full(IDS).logits, expected, atol=1e-5 * float(expected.abs().max()))
        dense = full.model.layers[1].mlp.experts.dense()
    assert type(dense) is type(model.model.layers[1].mlp.experts)
    assert torch.allclose(dense.down_proj, model.model.layers[1].mlp.experts.down_proj, atol=1e-5)


def fitting(experts, plan, directory=None):
    return ExpertFitting(
        experts, plan, LowRank(), lambda stack, weight, gram: factorize(weight, gram, stack.rank), directory
    )


def test_an_expert_is_fitted_to_its_own_tokens_where_they_are_many(base):
    experts = loaded(base).model.layers[1].mlp.experts
    up, down = plan = planned(loaded(base))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 32, generator=generator)
    index = torch.randint(6, (400, 2), generator=generator)
    with torch.no_grad():
        statistics = fitting(experts, plan)
        for half in (slice(0, 200), slice(200, 400)):
            statistics.add(hidden[half], index[half])
        stacked = statistics.fit()
        assert (up.tap, down.tap) == ("output", "input")
        for expert in range(6):
            x = hidden[(index == expert).any(dim=-1)]
            assert len(x) > 64
            inner = activate(experts, linear(x, experts.gate_up_proj[expert]))
            for stack, weight, inputs in (
                (up, experts.gate_up_proj[expert], x),
                (down, experts.down_proj[expert], inner),
            ):
                gram = Gram(stack.tap, stack.out_features if stack.tap == "output" else stack.in_features)
                gram.add(linear(inputs, weight) if stack.tap == "output" else inputs)
                alone = factorize(weight, gram, stack.rank)
                assert torch.allclose(product_of(stacked[stack.path], expert), alone.u @ alone.v, atol=1e-5)


def test_an_expert_without_tokens_is_fitted_to_those_of_the_layer(base):
    experts = loaded(base).model.layers[1].mlp.experts
    up, _ = plan = planned(loaded(base))
    direction = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(300, 4, generator=torch.Generator().manual_seed(2)) @ direction.T  # 4 of 32 directions
    index = torch.zeros(300, 1, dtype=torch.int64)  # the first expert gets all
    with torch.no_grad():
        statistics = fitting(experts, plan)
        statistics.add(hidden, index)
        stacked = statistics.fit()
        for expert in range(6):
            weight = experts.gate_up_proj[expert]
            product = product_of(stacked[up.path], expert)
            assert up.rank < 32
            assert torch.allclose(linear(hidden, product), linear(hidden, weight), atol=1e-4)
            assert not torch.allclose(product, weight, atol=1e-2)
        assert fitting(experts, plan).fit() == {}


def test_an_expert_answers_on_the_emulator_s_inputs_as_on_the_base_s(base):
    """Its inputs in the emulator are those of the base in other directions: what is fitted turns them back."""
    experts = loaded(base).model.layers[1].mlp.experts
    plan = [replace(stack, rank=min(stack.shape)) for stack in planned(loaded(base))]
    generator = torch.Generator().manual_seed(0)
    hidden, turn = (torch.randn(count, 32, generator=generator) for count in (600, 32))
    turn = torch.linalg.qr(turn).Q
    index = torch.randint(6, (600, 2), generator=generator)
    weights = torch.rand(600, 2, generator=generator)
    with torch.no_grad():
        statistics = fitting(experts, plan)
        statistics.add(hidden, index, hidden @ turn, index)
        _, answers = statistics.settle()
        expected = experts(hidden, index, weights)
        answered = answers["model.layers.1.mlp.experts"](hidden @ turn, index, weights)
        uncorrected = experts(hidden @ turn, index, weights)
    lost, before = ((output - expected).norm() / expected.norm() for output in (answered, uncorrected))
    assert float(lost) < 0.05
    assert float(before) > 0.5


@pytest.mark.parametrize("at_once", [1, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_are_read_for_some_experts_at_a_time_give_the_same(base, tmp_path, monkeypatch, dtype, at_once):
    experts = loaded(base).model.layers[1].mlp.experts.to(dtype)
    plan = planned(loaded(base))
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(5, (300, 2), generator=generator)  # none is sent to the last
    streams = [torch.randn(300, 32, generator=generator).to(dtype) for _ in range(2)]
    reads, read = [], ExpertFitting._read

    def counted(self, places):
        reads.append(len(places))
        return read(self, places)

    def fitted(directory):
        statistics = fitting(experts, plan, directory)
        for rows in (slice(0, 130), slice(130, 300)):  # rows of two lengths
            statistics.add(streams[0][rows], index[rows], streams[1][rows], index[rows])
        return statistics.fit()

    monkeypatch.setattr(ExpertFitting, "_read", counted)
    with torch.no_grad():
        in_memory = fitted(None)
        assert reads == [6]
        monkeypatch.setattr("emloc_core.emulator.experts.TOKENS_AT_ONCE", at_once)
        in_file = fitted(tmp_path)
    assert sum(reads[1:]) == 6
    assert len(reads) > 2
    for stack in plan:
        for name, part in in_memory[stack.path].parts.items():
            assert torch.equal(part, in_file[stack.path].parts[name])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_numbers_name_the_row(base, bad):
    statistics = fitting(loaded(base).model.layers[1].mlp.experts, planned(loaded(base)))
    with pytest.raises(EmlocError, match="NaN or Inf among the activations"):
        statistics.add(torch.full((3, 32), bad), torch.zeros(3, 2, dtype=torch.int64))


def test_streamed_factors_equal_those_of_a_whole_forward(base, rows_file, tmp_path):
    job = compression(base, rows_file, tmp_path / "emulator", calibration="base")
    model = loaded(base)
    statistics_of = {}
    for block, stacks_of in ((block, job.plan.experts_in_block(block)) for block in job.base.skeleton.blocks):
        for path, plan in stacks_of.items():
            module = model.get_submodule(path)
            statistics_of[block] = statistics = fitting(module, plan)
            module.register_forward_hook(lambda _, args, __, fitted=statistics: fitted.add(*args[:2]))
    with torch.no_grad():
        for sample in job.samples:
            model(**sample.inputs("cpu"), use_cache=False)
        expected = {}
        for statistics in statistics_of.values():
            expected |= statistics.fit()
    small = loaded(job.run())
    assert expected.keys() == set(STACKS)
    for path, fitted in expected.items():
        owner, _, name = path.rpartition(".")
        experts = small.get_submodule(owner)
        assert torch.equal(experts.weight[name], fitted.parts["weight"])
        assert torch.equal(experts.V[name], fitted.parts["V"])


def test_the_plan_s_bytes_are_the_written_ones(base, emulator, rows_file):
    job = compression(base, rows_file, emulator)
    description = job.describe()
    written = Checkpoint(emulator)
    assert description["emulator_bytes"] == written.nbytes < Checkpoint(base).nbytes
    assert not [key for key in written.tensors if ".experts.0." in key]
    result = read_manifest(emulator)["result"]
    assert result["bytes"]["emulator"] == written.nbytes
    errors = {row["path"]: row["relative_error"] for row in result["linears"] if row["path"] in STACKS}
    assert errors.keys() == set(STACKS)
    assert all(0 < error < 1 for error in errors.values())
    assert any("6 experts of 32 x 32" in line for line in description["summary"])
    model = MemoryModel(base / "config.json", Workload(batch_size=1, length=32))
    plan = model.plan(0.6)
    assert model.emulator_bytes(plan) == written.nbytes
    small = loaded(emulator)
    assert model.parameters(plan) == sum(parameter.numel() for parameter in small.parameters())
    assert 0 < model.tuning(plan).total < model.tuning().total


def misaligned(file):
    """Load tensors as from a file where each begins four bytes after a multiple of 64."""
    tensors = load_file(file)
    for name, tensor in tensors.items():
        shifted = torch.empty(4 + tensor.nbytes, dtype=torch.uint8)[4:].view(tensor.dtype).view(tensor.shape)
        tensors[name] = shifted.copy_(tensor)
    return tensors


def test_an_interrupted_run_resumes_bit_for_bit_wherever_tensors_are_in_files(
    base, emulator, rows_file, tmp_path, monkeypatch
):
    class KilledError(Exception):
        pass

    def kill(_block, done, _total):
        if done == 2:
            raise KilledError

    with pytest.raises(KilledError):
        compression(base, rows_file, tmp_path / "emulator").run(kill)
    monkeypatch.setattr("emloc_core.emulator.files.load_file", misaligned)
    again = compression(base, rows_file, tmp_path / "emulator").run()
    for file in emulator.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()
    assert (emulator / "config.json").read_bytes() == (again / "config.json").read_bytes()


def test_a_lora_is_tuned_corrected_and_merged(base, emulator, rows_file, tmp_path):
    train = TrainSettings(steps=6, batch_size=4, learning_rate=1e-2, bf16=False, logging_steps=3)
    adapter = train_job(emulator, rows_file, tmp_path / "adapter", train).run()
    log = json.loads((adapter / "log.json").read_text())
    assert log[-1]["loss"] < log[0]["loss"]
    corrected = correct_job(adapter, base, tmp_path / "corrected", CorrectSettings(clamp="none")).run()
    tuned = load_lora(loaded(emulator), adapter).eval()
    carried = load_lora(loaded(base), corrected).eval()
    with torch.no_grad():  # on the LoRA's inputs the base answers as the tuned emulator did
        for path, lora in Adapter(adapter).loras.items():
            assert "experts" not in path
            name = f"base_model.model.{path}"
            expected, actual = (model.get_submodule(name)(lora.a.float()) for model in (tuned, carried))
            assert torch.allclose(actual, expected, atol=1e-5 * float(expected.abs().max()))
    merged = merge_job(corrected, base, tmp_path / "merged").run()
    merged_model, before = loaded(merged), loaded(base)
    with torch.no_grad():
        assert torch.allclose(merged_model(IDS).logits, carried(IDS).logits, atol=1e-4)
    for path in STACKS:
        assert torch.equal(merged_model.get_parameter(path), before.get_parameter(path))


def test_the_emulator_is_saved_and_loaded_again(emulator, tmp_path):
    small = loaded(emulator)
    small.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "again")(IDS).logits, small(IDS).logits)
        dense = loaded(emulator).dequantize()
        assert not any(isinstance(module, StandInExperts) for module in dense.modules())
        assert torch.allclose(dense(IDS).logits, loaded(emulator)(IDS).logits, atol=1e-5)


def test_a_block_that_would_draw_its_experts_draws_none(emulator, monkeypatch):
    """As that of Qwen3-Omni, whose initial values are asked for where a checkpoint has the model's weights, too."""
    plain = Qwen3MoePreTrainedModel._init_weights

    def drawing(model, module):
        plain(model, module)
        if isinstance(module, Qwen3MoeSparseMoeBlock):
            torch.nn.init.normal_(module.experts.gate_up_proj)

    monkeypatch.setattr(Qwen3MoePreTrainedModel, "_init_weights", drawing)
    assert torch.isfinite(loaded(emulator)(IDS).logits).all()


def test_missing_factors_are_found(emulator, tmp_path):
    shutil.copytree(emulator, tmp_path / "emulator")
    index = json.loads((tmp_path / "emulator" / "model.safetensors.index.json").read_text())
    shard = tmp_path / "emulator" / index["weight_map"].pop("model.layers.1.mlp.experts.V.down_proj")
    tensors = load_file(shard)
    del tensors["model.layers.1.mlp.experts.V.down_proj"]
    save_file(tensors, shard, {"format": "pt"})
    (tmp_path / "emulator" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EmlocError, match=r"lacks model.layers.1.mlp.experts.V.down_proj"):
        loaded(tmp_path / "emulator")


def test_packed_experts_are_planned_loaded_and_saved(base, packed, rows_file, tmp_path):
    kind = kind_of(Checkpoint(packed).config)
    job = compress_job(base, rows_file, packed, CompressSettings(kind=kind, samples=12, selection=6))
    written = Checkpoint(packed)
    assert job.describe()["emulator_bytes"] == written.nbytes < Checkpoint(base).nbytes
    model = MemoryModel(base / "config.json", Workload(batch_size=1, length=32), CompressSettings(kind=kind))
    assert model.emulator_bytes(model.plan()) == written.nbytes
    small = loaded(packed)
    assert written.config["quantization_config"]["quant_method"] == "emloc"
    assert sum(isinstance(module, StandInExperts) for module in small.modules()) == 2
    small.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        logits = small(IDS).logits
        assert torch.equal(loaded(tmp_path / "again")(IDS).logits, logits)
        dense = loaded(packed).dequantize()
        assert not any(isinstance(module, StandInExperts) for module in dense.modules())
        assert torch.allclose(dense(IDS).logits, logits, atol=1e-5)
        apart = float((logits - loaded(base)(IDS).logits).norm() / loaded(base)(IDS).logits.norm())
    assert 1e-4 < apart < 1


def test_a_lora_on_packed_experts_is_trained_corrected_and_merged(base, packed, rows_file, tmp_path):
    train = TrainSettings(steps=2, batch_size=2, learning_rate=1e-2, bf16=False, logging_steps=1)
    adapter = train_job(packed, rows_file, tmp_path / "adapter", train).run()
    corrected = correct_job(adapter, base, tmp_path / "corrected", CorrectSettings(clamp="none")).run()
    model, before = loaded(merge_job(corrected, base, tmp_path / "merged").run()), loaded(base)
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, before(IDS).logits, atol=1e-4)
    for path in STACKS:
        assert torch.equal(model.get_parameter(path), before.get_parameter(path))


def test_experts_are_rounded_without_calibration(base, rows_file, tmp_path):
    settings = CompressSettings(kind="nf4", calibration="none", selection=6)
    small = loaded(compress_job(base, rows_file, tmp_path / "emulator", settings).run())
    before, after = (model.model.layers[1].mlp.experts for model in (loaded(base), small))
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            for expert, matrix in enumerate(before.get_parameter(name)):
                alone = format_named("nf4").own().round(matrix)
                for part, tensor in format_named("nf4").own().pack(alone, torch.float32).items():
                    assert torch.equal(after.get_parameter(f"{part}.{name}")[expert], tensor)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"allocator": "global"}, "only Linears have spectra"),
    ],
)
def test_experts_stay_dense_where_there_are_no_factors_for_them(base, rows_file, tmp_path, settings, reason):
    job = compression(base, rows_file, tmp_path / "emulator", **settings)
    assert not set(STACKS) & job.plan.ranks.keys()
    lines = "\n".join(job.plan.lines(job.format))
    assert f"2 x gate_up_proj 6 experts of 32 x 32 -> dense: {reason}" in lines


def test_experts_of_another_layout_are_refused(base):
    model = loaded(base)
    experts = model.model.layers[1].mlp.experts
    del experts.is_transposed
    with pytest.raises(EmlocError, match="Qwen3MoeExperts is not laid out"):
        stacks(experts)
    kept = replace(QWEN_MOE, keep_dense={**QWEN_MOE.keep_dense, "model.layers.*.mlp.experts": "for this test"})
    experts.is_transposed = False
    assert {stack.reason for stack in find_linears(model, kept).experts} == {"for this test"}
