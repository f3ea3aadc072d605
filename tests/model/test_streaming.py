"""Streaming equals an ordinary forward, and holds one unit at a time."""

from contextlib import contextmanager

import pytest
import torch
from emloc_llama import LLAMA
from support.adapters import make_adapter
from support.jobs import compress_job, correct_job
from support.marks import most_thorough
from support.ranks import plan_ranks
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_core.algorithms.statistics import Gram
from emloc_core.errors import EmlocError
from emloc_core.family import Family, Tower
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.model.blocks import block_paths
from emloc_core.model.hooks import tapped
from emloc_core.model.lockstep import units
from emloc_core.model.opened import OpenModel
from emloc_core.model.streaming import Stream
from emloc_core.settings import CompressSettings, CorrectSettings

BLOCKS = ["model.layers"]
LENGTHS = (5, 17, 9)


@pytest.fixture(params=[False, True], ids=["page-cache", "thread"])
def skeleton(tiny_model, request, monkeypatch):
    """Its units are found in the page cache, or read by a thread as for a GPU."""
    monkeypatch.setattr(Stream, "pins", request.param)
    return OpenModel(Checkpoint(tiny_model), LLAMA).skeleton


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (1, length), generator=generator) for length in LENGTHS]


def test_units_are_blocks_and_the_largest_modules_without_blocks(skeleton):
    assert units(skeleton.model, BLOCKS) == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head",
    ]  # fmt: skip


def test_what_is_not_loaded_says_where_it_will_be(skeleton):
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert {parameter.device for parameter in skeleton.model.parameters()} == {torch.device("cpu")}
    skeleton.load("model.layers.1")
    skeleton.free("model.layers.1")
    assert skeleton.model.model.layers[1].mlp.down_proj.weight.is_meta
    assert skeleton.model.model.layers[1].mlp.down_proj.weight.device == skeleton.model.device == torch.device("cpu")


def test_logits_equal_those_of_the_whole_model_bit_for_bit(tiny_model, skeleton, samples):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto").eval()
    stream = Stream(skeleton)
    forwards = [lambda ids=ids: skeleton.model(input_ids=ids, use_cache=False).logits for ids in samples]
    with torch.no_grad():
        for ids, logits in zip(samples, stream.run(forwards), strict=True):
            assert torch.equal(logits, reference(input_ids=ids, use_cache=False).logits)


def test_statistics_equal_those_of_the_whole_model_bit_for_bit(tiny_model, skeleton, samples):
    plan = plan_ranks(skeleton.model, LLAMA, 0.5)

    def new_grams():
        return {
            linear.path: Gram(linear.tap, linear.out_features if linear.tap == "output" else linear.in_features)
            for linear in plan.linears
        }

    taps = {linear.path: linear.tap for linear in plan.linears}
    streamed, ordinary = new_grams(), new_grams()

    @contextmanager
    def gather(block):
        paths = [linear.path for linear in plan.in_block(block)]
        modules = {path: skeleton.model.get_submodule(path) for path in paths}
        with tapped(modules, taps, lambda path, activations: streamed[path].add(activations)):
            yield

    forwards = [lambda ids=ids: skeleton.model(input_ids=ids, use_cache=False) for ids in samples]
    Stream(skeleton).run(forwards, gather, block_paths(skeleton.model, LLAMA)[-1])

    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto").eval()
    modules = {path: reference.get_submodule(path) for path in taps}
    with torch.no_grad(), tapped(modules, taps, lambda path, activations: ordinary[path].add(activations)):
        for ids in samples:
            reference(input_ids=ids, use_cache=False)
    for path, gram in ordinary.items():
        assert torch.equal(gram.matrix, streamed[path].matrix), path
        assert streamed[path].tokens == sum(LENGTHS)


def test_one_unit_is_in_memory_at_a_time(skeleton, samples):
    loaded = []

    def visit(unit):
        loaded.append({name.rsplit(".", 3)[0] for name, p in skeleton.model.named_parameters() if not p.is_meta})
        present = [name for name, parameter in skeleton.model.named_parameters() if not parameter.is_meta]
        assert all(name.startswith(f"{unit}.") for name in present), present

    Stream(skeleton).run([lambda: skeleton.model(input_ids=samples[0], use_cache=False)], visit)
    assert len(loaded) == 6
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_samples_that_skip_units_catch_up(skeleton, samples):
    order = []

    def short():
        hidden, model = torch.ones(1, 1, 32), skeleton.model.model
        return model.layers[2](hidden, position_embeddings=model.rotary_emb(hidden, torch.zeros(1, 1)))

    def complete():
        return skeleton.model(input_ids=samples[0], use_cache=False).logits

    results = Stream(skeleton).run([short, complete], order.append)
    assert order == units(skeleton.model, BLOCKS)  # the block waited for the sample that came the long way
    assert [tuple(result.shape) for result in results] == [(1, 1, 32), (1, 5, 128)]


def test_blocks_wait_for_a_sample_that_comes_through_what_stands_behind_them_in_the_tree(skeleton, samples):
    """As an image that passes through a projector which the model made after its language model."""
    stream = Stream(skeleton)
    embed, visited = skeleton.model.get_input_embeddings(), {}

    def text():
        skeleton.model(input_ids=samples[0], use_cache=False)

    def image():
        hidden = embed(samples[1])
        skeleton.model.lm_head(hidden)
        skeleton.model(inputs_embeds=hidden, use_cache=False)

    stream.run([text, image], lambda unit: visited.update({unit: stream.visiting}), "model.layers.2")
    assert list(visited) == ["model.embed_tokens", "lm_head", *(f"model.layers.{index}" for index in range(3))]
    assert visited.pop("lm_head") == [1]
    assert all(sorted(rows) == [0, 1] for rows in visited.values())


def test_a_module_outside_the_blocks_may_run_again(tiny_model, skeleton, samples):
    """As the last norm of a vision tower, on all of its tokens and on one that stands for them."""

    def forward(model):
        embedded = model.get_input_embeddings()(samples[0]).sum()
        return model(input_ids=samples[0], use_cache=False).logits + embedded

    order = []
    (logits,) = Stream(skeleton).run([lambda: forward(skeleton.model)], order.append)
    assert order.count("model.embed_tokens") == 2
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(logits, forward(reference))


def test_a_block_that_runs_twice_is_refused(skeleton, samples):
    def twice():
        skeleton.model(input_ids=samples[0], use_cache=False)
        return skeleton.model(input_ids=samples[0], use_cache=False)

    with pytest.raises(EmlocError, match="second time"):
        Stream(skeleton).run([twice])


def test_an_error_in_a_forward_reaches_the_caller_and_frees_the_weights(skeleton, samples):
    def broken():
        skeleton.model(input_ids=samples[0], use_cache=False)
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        Stream(skeleton).run([broken, lambda: skeleton.model(input_ids=samples[1], use_cache=False)])
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_buffers_that_the_checkpoint_holds_are_loaded(tmp_path):
    """A router's correction bias is a buffer, and what it holds decides where tokens go."""
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape))
    model.save_pretrained(tmp_path)
    family = Family(
        name="routed", model_types=frozenset({"deepseek_v3"}),
        towers=[Tower(name="language", blocks="model.layers", input_groups=[["self_attn.o_proj"]])],
    )  # fmt: skip
    skeleton = OpenModel(Checkpoint(tmp_path), family).skeleton
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    (logits,) = Stream(skeleton).run([lambda: skeleton.model(input_ids=ids, use_cache=False).logits])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(logits, reference(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", most_thorough(["nf4", "low-rank"], "low-rank"))
def test_stages_write_the_same_bytes(kind, tiny_model, rows_file, tmp_path, monkeypatch):
    outputs, settings, adapter = [], CompressSettings(kind=kind, samples=6, selection=4), None
    for name in ("page cache", "thread"):
        monkeypatch.setattr(Stream, "pins", name == "thread")
        emulator = compress_job(tiny_model, rows_file, tmp_path / name / "emulator", settings).run()
        adapter = adapter or make_adapter(emulator, tmp_path / "adapter")
        corrected = correct_job(adapter, tiny_model, tmp_path / name / "corrected", CorrectSettings()).run()
        files = [*sorted(emulator.glob("*.safetensors")), corrected / "adapter_model.safetensors"]
        outputs.append([(file.name, file.read_bytes()) for file in files])
    assert outputs[0] == outputs[1]
