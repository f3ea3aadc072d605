"""LoRAs on experts, by PEFT's ``target_parameters``: computed on packed stacks, corrected, merged, by exact steps."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from emloc_qwen import QWEN_MOE
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.jobs import compress_job, correct_job, exact_job, merge_job, polish_job, train_job
from support.marks import most_thorough
from support.models import save_tiny_model
from transformers import AutoModelForCausalLM

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.held_out import summed_loss
from emloc_core.algorithms.lora import flattened, of_experts
from emloc_core.compat.peft import parameter_wrappers
from emloc_core.errors import EmlocError
from emloc_core.files.lora import WEIGHTS
from emloc_core.files.pretrained import load_lora
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import Workload
from emloc_core.model.opened import open_model
from emloc_core.requests import ExportRequest
from emloc_core.serving.export import Export
from emloc_core.settings import CompressSettings, CorrectSettings, PolishSettings, TrainSettings
from emloc_core.standins.expert_loras import expert_stacks
from emloc_core.standins.experts import matrices
from emloc_core.tuning.evaluation import loras_of

MODELS = {
    "qwen3_moe": {**QWEN_MOE.tiny_configs[0], "num_experts": 6},
    "gpt_oss": {  # transposed, with biases and an interleaved gate
        "model_type": "gpt_oss", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 40, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4,
        "num_experts_per_tok": 2, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "mixtral": {
        "model_type": "mixtral", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4,
        "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
IDS = torch.arange(5, 40)[None]
TRAIN = TrainSettings(steps=3, batch_size=2, learning_rate=1e-2, bf16=False, logging_steps=1, lora_experts=True)


#: Of what follows for every layout, one is shown; layers are compared on two.
ONE_LAYOUT = pytest.mark.parametrize("base", most_thorough(MODELS, "gpt_oss"), indirect=True)


@pytest.fixture(scope="module", params=most_thorough(MODELS, "qwen3_moe", "gpt_oss"))
def base(request, tmp_path_factory):
    return save_tiny_model(MODELS[request.param], tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def emulator(base, rows_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("emulator") / "emulator"
    return compress_job(base, rows_file, output, CompressSettings(kind="trellis", samples=12, selection=6)).run()


@pytest.fixture(scope="module")
def adapter(emulator, rows_file, tmp_path_factory):
    return train_job(emulator, rows_file, tmp_path_factory.mktemp("adapter") / "adapter", TRAIN).run()


def loaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def with_lora(model, **changed):
    """Put a LoRA on a model's experts by PEFT, always of the same numbers."""
    config = {"r": 2, "target_modules": [], "target_parameters": expert_stacks(model), "task_type": "CAUSAL_LM"}
    lora = get_peft_model(model, LoraConfig(**{**config, **changed}))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    return lora


def passed(lora):
    """Return logits of a forward pass, and all gradients of its loss by name."""
    lora.zero_grad()
    output = lora(input_ids=IDS, labels=IDS)
    output.loss.backward()
    return output.logits.detach(), {
        name: parameter.grad.clone() for name, parameter in lora.named_parameters() if parameter.requires_grad
    }


def in_peft_s_way(lora):
    """Undo what computes LoRAs beside their stacks."""
    for _, wrappers in parameter_wrappers(lora):
        del wrappers[0].forward
    return lora


def test_packed_experts_compute_and_learn_as_their_dense_ones_by_peft_alone(emulator):
    """PEFT's faults: stacks without a LoRA, stacks without a gradient, and keys that are those of the other stack."""
    dense = in_peft_s_way(with_lora(loaded(emulator).dequantize().requires_grad_(requires_grad=False)))
    expected, gradients = passed(dense)
    lora = with_lora(loaded(emulator))
    for mode in (lora.train(), lora.eval()):
        logits, learned = passed(mode)
        assert torch.allclose(logits, expected, atol=1e-5)
        assert learned.keys() == gradients.keys()
        for name, gradient in learned.items():
            assert gradient.shape == gradients[name].shape
            assert float(gradient.norm()) > 0
            assert torch.allclose(gradient, gradients[name], rtol=1e-3, atol=1e-6), name
    with lora.disable_adapter(), torch.no_grad():
        assert torch.equal(lora(input_ids=IDS).logits, loaded(emulator)(IDS).logits)


def test_ends_of_names_are_no_less_than_names_in_full(emulator):
    ends = [".".join(name.split(".")[-3:]) for name in expert_stacks(loaded(emulator))]
    in_full, by_ends = (with_lora(loaded(emulator), **options) for options in ({}, {"target_parameters": ends}))
    assert [name for name, _ in by_ends.named_parameters()] == [name for name, _ in in_full.named_parameters()]
    assert torch.equal(passed(by_ends)[0], passed(in_full)[0])


@ONE_LAYOUT
def test_an_adapter_names_its_stacks_in_an_order_that_is_always_the_same(emulator, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(expert_stacks(loaded(emulator)))


def test_places_for_peft_take_no_memory(emulator):
    lora = with_lora(loaded(emulator)).to(torch.float64)  # as a trainer moves it to a GPU
    for _, (outer, *_) in parameter_wrappers(lora):
        for name in ("gate_up_proj", "down_proj"):
            placeholder = outer.get_base_layer().get_parameter(name)
            assert (placeholder.dtype, placeholder.untyped_storage().nbytes()) == (torch.float64, 8)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["mlp.experts.down_proj"], "both stacks"),
        (["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "input_layernorm.weight"], "is not a stack of experts"),
    ],
)
def test_what_could_not_be_transferred_is_refused(emulator, targets, message):
    with pytest.raises(EmlocError, match=message):
        with_lora(loaded(emulator), target_parameters=targets)


def test_a_dense_model_s_single_stack_is_left_to_peft(base):
    lora = with_lora(loaded(base), target_parameters=["mlp.experts.down_proj"])
    assert all(float(gradient.norm()) > 0 for gradient in passed(lora)[1].values())
    assert not any("forward" in vars(outer) for _, (outer, *_) in parameter_wrappers(lora))


@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
def test_an_adapter_on_a_single_stack_is_told_to_have_both(base, tmp_path, stack):
    with_lora(loaded(base), target_parameters=[f"mlp.experts.{stack}"]).save_pretrained(tmp_path)
    with pytest.raises(EmlocError, match=r"one stack of experts only, in model\.layers\.\d\.mlp\.experts"):
        _ = Adapter(tmp_path).loras


def test_several_loras_are_left_to_peft_and_refused_on_stand_ins(base, emulator):
    config = {"r": 2, "target_modules": [], "target_parameters": expert_stacks(loaded(base)), "task_type": "CAUSAL_LM"}
    for model, refused in ((loaded(base), False), (loaded(emulator), True)):
        lora = with_lora(model)
        expected = passed(lora)[0]
        lora.add_adapter("other", LoraConfig(**config))  # which adds nothing
        assert torch.equal(passed(lora)[0], expected)
        lora.base_model.set_adapter(["default", "other"])
        with torch.no_grad(), pytest.raises(EmlocError, match="one LoRA at a time") if refused else nullcontext():
            assert torch.allclose(lora(input_ids=IDS).logits, expected, atol=1e-5)


def test_factors_are_those_of_peft_s_layout():
    a, b = torch.randn(6, 5), torch.randn(4, 6)
    lora = of_experts(a, b, 2.0, 2)
    assert lora.shape == (3, 4, 5)
    expected = torch.einsum("o r e, e r i -> e o i", b.reshape(4, 2, 3), a.reshape(3, 2, 5))
    assert torch.equal(lora.b @ lora.a, expected)
    for half, again in zip((a, b), flattened(lora), strict=True):
        assert torch.equal(half, again)


def test_every_expert_is_corrected_by_the_formula(base, emulator, adapter, tmp_path):
    """On the LoRA's inputs, every expert of the base answers as that of the tuned emulator did."""
    corrected = correct_job(adapter, base, tmp_path / "corrected", CorrectSettings(clamp="none")).run()
    before, after = Adapter(adapter).loras, Adapter(corrected).loras
    stacks = expert_stacks(loaded(base))
    assert before.keys() == after.keys() > set(stacks)
    models = loaded(base), loaded(emulator).dequantize()
    for path in stacks:
        owner, _, name = path.rpartition(".")
        theirs, ours = (matrices(model.get_submodule(owner), name) for model in models)
        tuned, carried = (weights + lora.scale * lora.b @ lora.a for weights, lora in
                          ((ours, before[path]), (theirs, after[path])))  # fmt: skip
        inputs = before[path].a.mT
        expected = tuned @ inputs
        assert torch.allclose(carried @ inputs, expected, atol=1e-5 * float(expected.abs().max()))
        assert not torch.allclose(theirs, ours, atol=1e-3)


def test_plain_peft_loads_it_and_merging_is_what_peft_merges(base, adapter, tmp_path):
    corrected = correct_job(adapter, base, tmp_path / "corrected", CorrectSettings(clamp="auto")).run()
    lora = in_peft_s_way(PeftModel.from_pretrained(loaded(base), corrected))
    stored = load_file(corrected / WEIGHTS)
    assert stored.keys() == load_file(adapter / WEIGHTS).keys()
    merged = loaded(merge_job(corrected, base, tmp_path / "merged").run())
    expected = lora.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-6), name
    for path in expert_stacks(merged):
        assert not torch.allclose(merged.get_parameter(path), loaded(base).get_parameter(path), atol=1e-5)


@ONE_LAYOUT
def test_the_loss_of_candidates_is_that_of_the_base_with_the_lora(base, adapter, tmp_path):
    lora = load_lora(loaded(base), adapter).eval()
    job = correct_job(adapter, base, tmp_path / "corrected", CorrectSettings(clamp="auto"))
    expected, tokens = 0.0, 0
    with torch.no_grad():
        for sample in job.samples:
            loss, count = sample.loss(lora, torch.device("cpu")).tolist()
            expected, tokens = expected + loss, tokens + count
    assert summed_loss(job.skeleton, job.samples, loras_of(lora)).tolist() == pytest.approx(
        [expected, tokens], rel=1e-5
    )
    uncorrected = job.run() and [
        candidate["nll"]
        for candidate in job.output.result["candidates"]
        if (candidate["clamp"], candidate.get("scale", 1)) == (0, 1)
    ]
    assert uncorrected == [pytest.approx(expected / tokens, rel=1e-5)]


@ONE_LAYOUT
def test_exact_steps_are_those_of_the_trainer(base, emulator, adapter, rows_file, tmp_path):
    exact = exact_job(emulator, rows_file, tmp_path / "exact", TRAIN).run()
    for name, tensor in load_file(exact / WEIGHTS).items():
        assert torch.allclose(tensor, load_file(adapter / WEIGHTS)[name], atol=1e-4), name
    plain, streamed = (make(base, rows_file, tmp_path / name, TRAIN).run() for name, make in
                       (("plain", train_job), ("streamed", exact_job)))  # fmt: skip
    for name, tensor in load_file(streamed / WEIGHTS).items():
        assert torch.allclose(tensor, load_file(plain / WEIGHTS)[name], atol=1e-4), name
    corrected = correct_job(adapter, base, tmp_path / "corrected", CorrectSettings(clamp="auto")).run()
    settings = PolishSettings(steps=1, batch_size=2, bf16=False)
    polished = Adapter(polish_job(corrected, base, rows_file, tmp_path / "polished", settings).run()).loras
    before = Adapter(corrected).loras
    assert all(not torch.equal(polished[path].b, before[path].b) for path in expert_stacks(loaded(base)))


@ONE_LAYOUT
def test_it_is_planned(base, adapter):
    load = Workload(batch_size=2, length=32, train=TRAIN)
    model = MemoryModel(base / "config.json", load, CompressSettings(kind="trellis"))
    stored = load_file(adapter / WEIGHTS)
    assert model.adapter_parameters() == sum(tensor.numel() for tensor in stored.values())
    without = model.with_workload(Workload(batch_size=2, length=32))
    more = model.tuning(model.plan()).terms["adapter"] - without.tuning(without.plan()).terms["adapter"]
    assert more == 4 * (model.adapter_parameters() - without.adapter_parameters())


def test_it_is_exported_with_one_rank(base, adapter, tmp_path):
    corrected = correct_job(adapter, base, tmp_path / "corrected", CorrectSettings(clamp="none")).run()
    job = Export(ExportRequest(source=str(corrected), output=tmp_path / "served"))
    assert any("experts" in warning for warning in job.describe()["warnings"])
    served = PeftModel.from_pretrained(loaded(base), job.run())
    with torch.no_grad():
        expected = load_lora(loaded(base), corrected)(input_ids=IDS).logits
        assert torch.allclose(served(input_ids=IDS).logits, expected, atol=1e-4)


def test_a_model_without_experts_is_refused(tiny_model, rows_file, tmp_path):
    with pytest.raises(EmlocError, match="no experts to put a LoRA on"):
        train_job(tiny_model, rows_file, tmp_path / "adapter", TRAIN)


@pytest.mark.parametrize("base", most_thorough(MODELS, "qwen3_moe"), indirect=True)
def test_a_lora_of_another_model_s_experts_is_refused(base, adapter, rows_file, tmp_path):
    other = copy.deepcopy(open_model(str(base), "cpu").checkpoint.config)
    other["moe_intermediate_size" if "moe_intermediate_size" in other else "intermediate_size"] = 48
    another = save_tiny_model(other, tmp_path / "other")
    with pytest.raises(EmlocError, match=r"experts\.\w+ is for a weight of shape"):
        polish_job(adapter, another, rows_file, tmp_path / "polished", PolishSettings())
