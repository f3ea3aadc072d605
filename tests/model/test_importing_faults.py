"""Checkpoints that cannot be imported are refused by name, and nothing is written."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.internvl_chat import (
    InternVLChat,
    chat_config,
    edit,
    internlm2_config,
    randomise,
    save_source,
    sentencepiece_model,
    sentencepiece_pieces,
    text_config,
    write,
)
from support.jobs import import_job

from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.hookspecs import hookimpl
from emloc_core.layout import Layout
from emloc_core.plugins.manager import PluginManager


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """An InternVL with an InternLM2 as it is published."""
    vision = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
    config = chat_config(internlm2_config(), vision_config=vision)
    return save_source(tmp_path_factory.mktemp("faults") / "source", randomise(InternVLChat(config)), config)


@pytest.fixture
def source(published, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(published, tmp_path / "source")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (sentencepiece_model(sentencepiece_pieces(), kind=1), "model type 1"),
        (sentencepiece_model(sentencepiece_pieces())[:-9], "is not a SentencePiece model"),
        (b"", "0 pieces"),
        (None, "neither a tokenizer.json nor a tokenizer.model"),
    ],
)
def test_a_tokenizer_that_cannot_be_converted_is_named(source, tmp_path, content, named):
    (source / "tokenizer.model").unlink()
    if content is not None:
        (source / "tokenizer.model").write_bytes(content)
    with pytest.raises(EmlocError, match=named):
        import_job(source, tmp_path / "out")


def test_added_tokens_may_leave_no_gaps(source, tmp_path):
    edit(source, "added_tokens.json", **{"<IMG_CONTEXT>": 318})
    edit(source, "tokenizer_config.json", added_tokens_decoder={})
    with pytest.raises(EmlocError, match="'<IMG_CONTEXT>' the id 318"):
        import_job(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("config.json", {"ps_version": "v1"}, "ps_version is 'v1'"),
        ("config.json", {"use_llm_lora": 16}, "use_llm_lora is 16"),
        ("config.json", {"use_backbone_lora": 8}, "use_backbone_lora is 8"),
        ("config.json", {"pad2square": True}, "pad2square is True"),
        ("config.json", {"template": "phi3-chat"}, "template is 'phi3-chat'"),
        ("config.json", {"use_thumbnail": False}, "use_thumbnail is False"),
        ("config.json", {"force_image_size": 16}, "force_image_size is 16"),
        ("config.json", {"downsample_ratio": 0.3}, "downsample_ratio is 0.3"),
        ("config.json", {"downsample_ratio": 0.125}, "downsample_ratio is 0.125"),
        ("config.json", {"downsample_ratio": "half"}, r"downsample_ratio is 'half' \(not a number"),
        ("config.json", {"max_dynamic_patch": None}, "max_dynamic_patch is None"),
        ("config.json", {"template": ["internlm2-chat"]}, r"template is \['internlm2-chat'\] \(not a name"),
        ("config.json", {"vision_config__image_size": "big"}, "vision_config.image_size is 'big'"),
        ("config.json", {"vision_config__patch_size": 0}, r"vision_config.patch_size is 0 \(not a whole number"),
        ("config.json", {"llm_config__hidden_size": "x"}, "wqkv.weight .*cannot be split"),
        ("config.json", {"llm_config__model_type": "phi3"}, "llm_config.model_type is 'phi3'"),
        ("config.json", {"vision_config__norm_type": "batch_norm"}, "vision_config.norm_type is 'batch_norm'"),
        ("config.json", {"vision_config__model_type": "siglip"}, "vision_config.model_type is 'siglip'"),
        ("config.json", {"vision_config__layer_norm_eps": 1e-5}, "vision_config.layer_norm_eps is 1e-05"),
        ("config.json", {"vision_config": None}, "no vision_config"),
        ("config.json", {"llm_config__num_attention_heads": 5}, "wqkv.weight .*cannot be split"),
        ("config.json", {"vision_config__hidden_act": "nonsense"}, "nonsense"),
        ("config.json", {"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ("config.json", {"llm_config__intermediate_size": 48}, r"w[12].weight .*; the config says \(.*48.*\)"),
        ("config.json", {"model_type": "llama"}, "needs no import"),
        ("config.json", {"model_type": "no_such"}, "No installed plugin imports .*internvl_chat"),
        ("added_tokens.json", {"<img>": "x"}, "damaged"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_named_and_nothing_is_written(source, tmp_path, file, changes, named):
    edit(source, file, **changes)
    with pytest.raises(EmlocError, match=named):
        import_job(source, tmp_path / "out").run()
    assert not {path.name for path in tmp_path.iterdir()} & {"out", ".out.partial"}


@pytest.mark.parametrize("subdirectory", [".", "native", "a/native"])
def test_an_output_within_the_source_is_refused(source, subdirectory):
    before = sorted(source.rglob("*"))
    with pytest.raises(EmlocError, match="is inside the source"):
        import_job(source, source / subdirectory)
    assert sorted(source.rglob("*")) == before


def test_all_unsupported_fields_are_named_at_once(source, tmp_path):
    edit(source, "config.json", ps_version="v1", pad2square=True)
    with pytest.raises(EmlocError, match=r"pad2square.*ps_version"):
        import_job(source, tmp_path / "out")


@pytest.mark.parametrize("token", ["<img>", "<IMG_CONTEXT>", "<|im_end|>"])
def test_a_missing_token_is_named(tmp_path, token):
    config = chat_config(text_config("qwen2"))
    source = save_source(tmp_path / "source", InternVLChat(config), config)
    content = json.loads((source / "tokenizer.json").read_text())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != token]
    write(source, "tokenizer.json", content)
    with pytest.raises(EmlocError, match=f"no token {token}".replace("|", r"\|")):
        import_job(source, tmp_path / "out")


def rewrite(directory, key, change):
    """Put what ``change`` makes of a shard's tensors in its place."""
    path = Checkpoint(directory).tensors[key].shard
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


WO = "language_model.model.layers.1.attention.wo.weight"
EXTRA = "language_model.model.layers.1.attention.lora_A.weight"
FAULTS = {
    "missing": (lambda tensors: tensors.pop(WO), "lacks .*layers.1.(self_attn.o_proj|attention.wo).weight"),
    "unknown": (lambda tensors: tensors.update({"mlp2.0.weight": torch.ones(2)}), "mlp2.0.weight, which the layout"),
    "not the model's": (lambda tensors: tensors.update({EXTRA: torch.ones(2)}), "layers.1.attention.lora_A.weight"),
    "twice": (
        lambda tensors: tensors.update({WO.replace("attention.wo", "self_attn.o_proj"): torch.ones(32, 32)}),
        "would both be",
    ),
    "wrong shape": (lambda tensors: tensors.update({WO: torch.ones(32, 31)}), r"\(32, 31\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_with_other_tensors_is_refused_before_anything_is_written(source, tmp_path, fault):
    change, named = FAULTS[fault]
    rewrite(source, WO, change)
    with pytest.raises(EmlocError, match=named):
        import_job(source, tmp_path / "out")
    assert not {path.name for path in tmp_path.iterdir()} & {"out", ".out.partial"}


def test_a_truncated_shard_is_named(source, tmp_path):
    shard = Checkpoint(source).shards[1]
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(EmlocError, match=r"model-00002-of-00002\.safetensors .*truncated"):
        import_job(source, tmp_path / "out")


def test_a_shard_that_shrinks_meanwhile_leaves_nothing_that_looks_finished(source, tmp_path):
    job = import_job(source, tmp_path / "out")
    shard = job.source.shards[1]

    def truncate(shard_name, *_):
        if shard_name == job.source.shards[0].name:
            os.truncate(shard, shard.stat().st_size - 10)

    with pytest.raises(EmlocError, match="truncated"):
        job.run(truncate)
    assert not (tmp_path / "out").exists()


class Plugin:
    def __init__(self, hook, declared):
        setattr(self, hook, hookimpl(lambda: [declared]))


def declared(*layouts):
    """A manager with plugins that declare these layouts, one each, after a family of the model type ``known``."""
    manager = PluginManager()
    family = Family(name="other", model_types=frozenset({"known"}), towers=[])
    plugins = [Plugin("emloc_families", family)]
    plugins += [Plugin("emloc_layouts", layout) for layout in layouts]
    entries = [
        SimpleNamespace(name=f"plugin{index}", dist=None, load=lambda plugin=plugin: plugin)
        for index, plugin in enumerate(plugins)
    ]
    manager.load(entries)
    return manager


def layout(name="a", model_type="a_chat"):
    return Layout(name, frozenset({model_type}), lambda config, _directory: dict(config), [(r"(.+)", r"\1")])


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("text", "not Layout"),
        (layout("a", "b_chat"), "'a' is already declared"),
        (layout("b", "a_chat"), "a_chat"),
        (layout("b", "known"), "'other' already declares the model types"),
        (Layout("b", "b_chat", dict, []), "the layout 'b' has model_types"),
        (Layout("b", frozenset({"b_chat"}), dict, [("(.+)",)]), "the layout 'b' has renames.0"),
    ],
)
def test_a_broken_layout_is_reported_and_breaks_no_other(broken, named):
    manager = declared(layout(), broken)
    assert manager.layout_for({"model_type": "a_chat"}).name == "a"
    assert named in manager.reports[2].error
    assert [report.error for report in manager.reports[:2]] == [None, None]
