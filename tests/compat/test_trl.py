"""What ``compat/trl.py`` needs of TRL."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support.contracts import contract
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from emloc_core.compat import trl

if trl.has_tiles():
    from trl.kernels import chunked_logprob

in_tiles = pytest.mark.skipif(not trl.has_tiles(), reason="this TRL's losses are of whole logits")


@pytest.fixture
def model() -> Any:
    """A Llama with TRL's loss, whose vocabulary takes two tiles."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=40_000, **sizes)).requires_grad_(False)
    llama.get_input_embeddings().requires_grad_()
    with contract("trl", "compat.trl.fuse_loss"):
        trl.fuse_loss(llama)
    return llama


def loss_of(model: Any) -> Any:
    ids = torch.arange(8)[None]
    labels = ids.masked_fill(ids < 6, -100)
    return model(input_ids=ids, labels=labels, fused_lm_head=True)


@in_tiles
@contract("trl", "compat.trl.fuse_loss")
def test_the_loss_is_of_the_labels(model):
    output = loss_of(model)
    assert {"log_probs", "entropy", "is_top1"} <= output.keys(), "the loss does not return what SFTTrainer asks for"
    plain = torch.nn.functional.cross_entropy(
        model.lm_head(model.model(torch.arange(8)[None]).last_hidden_state)[0, 5:7], torch.arange(8)[6:]
    )
    assert torch.allclose(-output.log_probs.sum() / 2, plain), "log_probs are not those of the labels"


@in_tiles
@contract("trl", "compat.trl.counted_tokens_alone")
def test_only_counted_tokens_are_projected(model, monkeypatch):
    rows = []
    tile = chunked_logprob._forward_tile
    monkeypatch.setattr(chunked_logprob, "_forward_tile", lambda z, *a, **k: rows.append(len(z)) or tile(z, *a, **k))
    loss_of(model)
    with trl.counted_tokens_alone():
        loss_of(model)
    assert rows == [7, 7, 2, 2], f"_use_triton no longer decides that only labelled tokens are projected: {rows}"


@in_tiles
@contract("trl", "compat.trl.tile_width")
def test_the_vocabulary_is_projected_in_tiles(model, monkeypatch):
    widths = []
    tile = chunked_logprob._forward_tile
    monkeypatch.setattr(
        chunked_logprob, "_forward_tile", lambda z, *a, **k: widths.append(z.shape[1]) or tile(z, *a, **k)
    )
    loss_of(model)
    width = trl.tile_width()
    assert widths == [width, 40_000 - width], f"tiles have other widths than _CHUNKED_LOGPROB_CHUNK_SIZE: {widths}"


@in_tiles
@contract("trl", "compat.trl.tiles_of")
def test_tiles_are_as_wide_as_they_are_asked_to_be(model):
    with trl.tiles_of(None):
        loss, width = loss_of(model).loss, trl.tile_width()
    with trl.tiles_of(8192):
        narrow = loss_of(model).loss
        assert trl.tile_width() == 8192 < width, "_CHUNKED_LOGPROB_CHUNK_SIZE does not say how wide tiles are"
    assert torch.allclose(loss, narrow), "the loss depends on the width of its tiles"


@in_tiles
@contract("trl", "compat.trl.tiles_in_place")
def test_tiles_are_reduced_by_functions_that_can_be_left_out(model):
    """With gradients of the hidden states, which take the product with the vocabulary's rows."""
    with trl.tiles_in_place():
        output = loss_of(model)
        (-output.log_probs.sum()).backward()
    gradient = model.get_input_embeddings().weight.grad
    assert not gradient.any(), "tiles are not reduced by _forward_tile, _backward_tile and _addmm_fp32 alone"


@contract("trl", "compat.trl.answer_loss")
def test_a_loss_of_all_tokens_is_of_their_labels(model):
    """In tiles or of whole logits."""
    ids = torch.arange(8)[None]
    loss, _ = trl.answer_loss(model, {"input_ids": ids})
    plain = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    assert torch.allclose(loss * (8 / 7 if trl.has_tiles() else 1), plain), "the loss is not that of the labels"


@contract("trl", "compat.trl.mean_log_probs")
def test_the_mean_of_answers_is_over_tokens_that_count(model):
    ids, mask = torch.arange(8)[None], torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1]])
    plain = torch.nn.functional.cross_entropy(model(ids).logits[0, 5:7], ids[0, 6:])
    mean = trl.mean_log_probs(model, {"input_ids": ids, "completion_mask": mask})
    assert torch.allclose(-mean, plain), "log_probs are not those of the tokens that count"


class SeenError(Exception):
    pass


@pytest.mark.parametrize(("trainer", "config"), [(DPOTrainer, DPOConfig), (KTOTrainer, KTOConfig)])
@contract("trl", "compat.trl.TokenizedDataset")
def test_a_dataset_of_preferences_is_prepared_by_a_method(trainer, config, tiny_model, tmp_path):
    class Tokenized(trl.TokenizedDataset, trainer):
        def prepared(self, dataset, args):
            raise SeenError(dataset, args.beta)

    rows = Dataset.from_list([{"prompt_ids": [1]}])
    seen = ()
    try:
        Tokenized(
            AutoModelForCausalLM.from_pretrained(tiny_model),
            args=config(str(tmp_path), beta=0.3, use_cpu=True, bf16=False),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
            peft_config=LoraConfig(target_modules=["q_proj"]),
        )
    except SeenError as error:
        seen = error.args
    assert seen == (rows, 0.3), "_prepare_dataset is not called with the dataset and the config"
