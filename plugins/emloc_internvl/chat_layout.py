"""The layout that InternVL is published in (``internvl_chat``), with its own code, which is never run.

Its vision tower is an InternViT with queries, keys and values in one weight; the language model, a Qwen2, Qwen3, Llama
or InternLM2, is under ``language_model``; ``mlp1`` is the projector.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_core.errors import EmlocError
from emloc_core.layout import Layout, Split
from emloc_internvl import internlm2
from emloc_internvl.chat_files import TEMPLATES, native_files, tokens_a_tile
from emloc_internvl.tokens import require_token

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]

#: Defaults of the source's config classes.
CHAT_DEFAULTS: dict[str, Any] = {
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "pad2square": False,
    "select_layer": -1,
    "force_image_size": None,
    "downsample_ratio": 0.5,
    "template": None,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "ps_version": "v1",
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}
VISION_DEFAULTS: dict[str, Any] = {
    "model_type": "intern_vit_6b",
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": False,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "qk_normalization": True,
    "num_hidden_layers": 48,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 0.1,
}
#: Vision fields with the same name and meaning in the native config.
_SAME_VISION = ("num_channels", "hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers",
                "hidden_act", "norm_type", "layer_norm_eps", "attention_dropout", "initializer_range")  # fmt: skip
_WHOLE_NUMBERS = (
    "min_dynamic_patch",
    "max_dynamic_patch",
    *(f"vision_config.{name}" for name, value in VISION_DEFAULTS.items() if type(value) is int),
)
#: Language models whose tensors have the native names already; InternLM2 has its own rules.
_NATIVE_TEXT = ("qwen2", "qwen3", "llama")
_NATIVE_NORM_EPS = 1e-6  # of the native query and key norms, whatever the config says


def read_config(config: Config) -> dict[str, Any]:
    """Return the source's config with its classes' defaults filled in.

    Raises:
        EmlocError: a part is missing, or fields have values that the native model cannot have; names all of them.
    """
    for section in ("vision_config", "llm_config"):
        if not isinstance(config.get(section), Mapping):
            raise EmlocError(f"The config of this 'internvl_chat' has no {section}.", "Copy config.json again.")
    chat = {**CHAT_DEFAULTS, **config, "vision_config": {**VISION_DEFAULTS, **config["vision_config"]}}
    problems = list(_malformed(chat)) or _unsupported(chat)
    if wrong := [f"{field} is {value!r} ({reason})" for field, value, reason in problems]:
        raise EmlocError(
            f"The native InternVL cannot be given this config: {'; '.join(wrong)}.",
            "Only a checkpoint without these can be imported.",
        )
    return chat


def _malformed(chat: Config) -> Iterable[tuple[str, Any, str]]:
    """Yield (field, value, reason) for values of the wrong type."""
    for field in _WHOLE_NUMBERS:
        section, _, name = field.rpartition(".")
        value = (chat[section] if section else chat)[name]
        if type(value) is not int or value < 1:
            yield field, value, "not a whole number of at least 1"
    if type(chat["downsample_ratio"]) not in (int, float):
        yield "downsample_ratio", chat["downsample_ratio"], "not a number"
    if not isinstance(chat["template"], str | None):
        yield "template", chat["template"], "not a name"


def _unsupported(chat: Config) -> Iterable[tuple[str, Any, str]]:
    """Yield (field, value, reason) for what the native model cannot do."""
    vision, text = chat["vision_config"], chat["llm_config"]
    for field in ("use_backbone_lora", "use_llm_lora"):
        if chat[field]:
            yield field, chat[field], "merge the LoRA into the weights first"
    if chat["pad2square"]:
        yield "pad2square", chat["pad2square"], "images are not padded"
    if chat["ps_version"] != "v2":
        yield "ps_version", chat["ps_version"], "the native pixel shuffle is v2"
    if chat["template"] not in TEMPLATES:
        yield "template", chat["template"], f"known: {', '.join(sorted(TEMPLATES))}"
    if chat["dynamic_image_size"] and not chat["use_thumbnail"] and chat["max_dynamic_patch"] > 1:
        yield "use_thumbnail", chat["use_thumbnail"], "the native processor adds a thumbnail to every tiled image"
    if chat["force_image_size"] not in (None, vision["image_size"]):
        yield "force_image_size", chat["force_image_size"], f"the vision tower is made for {vision['image_size']}"
    grid, ratio = vision["image_size"] // vision["patch_size"], chat["downsample_ratio"]
    if not 0 < ratio <= 1 or not (1 / ratio).is_integer() or not (grid * ratio).is_integer():
        yield "downsample_ratio", ratio, f"{grid} patches a side cannot be merged so"
    if vision["model_type"] != "intern_vit_6b":
        yield "vision_config.model_type", vision["model_type"], "the native vision tower is an InternViT"
    if vision["norm_type"] not in ("layer_norm", "rms_norm"):
        yield "vision_config.norm_type", vision["norm_type"], "known: layer_norm, rms_norm"
    if vision["qk_normalization"] and vision["layer_norm_eps"] != _NATIVE_NORM_EPS:
        yield "vision_config.layer_norm_eps", vision["layer_norm_eps"], "native query and key norms have 1e-6"
    types = (*_NATIVE_TEXT, "internlm2")
    if text.get("model_type") not in types:
        yield "llm_config.model_type", text.get("model_type"), f"known: {', '.join(types)}"


def native_config(config: Config, directory: Path) -> dict[str, Any]:
    """Return the ``config.json`` of the native model.

    Raises:
        EmlocError: see :func:`read_config`; or the tokenizer has no token for images.
    """
    chat = read_config(config)
    vision, text = chat["vision_config"], text_config(chat["llm_config"])
    image, patch = vision["image_size"], vision["patch_size"]
    native = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": {
            "model_type": "internvl_vision",
            **{field: vision[field] for field in _SAME_VISION},
            "attention_bias": vision["qkv_bias"],
            "use_qk_norm": vision["qk_normalization"],
            "projection_dropout": vision["dropout"],
            "layer_scale_init_value": vision["initializer_factor"],
            "image_size": [image, image],
            "patch_size": [patch, patch],
            "use_mean_pooling": True,  # that is, no norm after the last layer
        },
        "text_config": text,
        "image_token_id": require_token(directory, "<IMG_CONTEXT>"),
        "image_seq_length": tokens_a_tile(chat),
        "downsample_ratio": chat["downsample_ratio"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": chat["select_layer"],
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    dtype = config.get("torch_dtype") or config.get("dtype") or chat["llm_config"].get("torch_dtype")
    return {**native, "dtype": dtype} if dtype else native


def text_config(config: Config) -> dict[str, Any]:
    """Return the native config of the language model: the fields of its class, without settings of ``generate``."""
    if config["model_type"] == "internlm2":
        return internlm2.llama_config(config)
    from transformers import AutoConfig, PreTrainedConfig

    fields = AutoConfig.for_model(config["model_type"]).to_dict().keys() - PreTrainedConfig().to_dict().keys()
    fields_set = {name: config[name] for name in sorted(fields | {"rope_theta", "rope_scaling"}) if name in config}
    fields_set = {name: value for name, value in fields_set.items() if value is not None}
    # Training writes use_cache false into the config.
    return {"model_type": config["model_type"], "tie_word_embeddings": False, **fields_set, "use_cache": True}


def split_qkv(qkv: "torch.Tensor", _config: Config) -> "Iterable[torch.Tensor]":
    """Return the rows of q_proj, k_proj and v_proj: a third each."""
    return qkv.unflatten(0, (3, -1)).unbind()


_layer, _native_layer = r"vision_model\.encoder\.layers\.(\d+)\.", r"model.vision_tower.encoder.layer.\1."
_embeddings, _embed = r"vision_model\.embeddings\.", "model.vision_tower.embeddings."
_VISION = [
    (rf"{_embeddings}class_embedding", f"{_embed}cls_token"),
    (rf"{_embeddings}position_embedding", f"{_embed}position_embeddings"),
    (rf"{_embeddings}patch_embedding\.(weight|bias)", rf"{_embed}patch_embeddings.projection.\1"),
    (rf"{_layer}norm1\.(weight|bias)", rf"{_native_layer}layernorm_before.\2"),
    (rf"{_layer}norm2\.(weight|bias)", rf"{_native_layer}layernorm_after.\2"),
    (rf"{_layer}ls([12])", rf"{_native_layer}lambda_\2"),
    (rf"{_layer}attn\.([qk])_norm\.weight", rf"{_native_layer}attention.\2_norm.weight"),
    (rf"{_layer}attn\.proj\.(weight|bias)", rf"{_native_layer}attention.projection_layer.\2"),
    (rf"{_layer}mlp\.fc([12])\.(weight|bias)", rf"{_native_layer}mlp.fc\2.\3"),
]
_PROJECTOR = [
    (r"mlp1\.0\.(weight|bias)", r"model.multi_modal_projector.layer_norm.\1"),
    (r"mlp1\.1\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"mlp1\.3\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
]
_TEXT = [
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"language_model\.lm_head\.weight", "lm_head.weight"),
]
_QKV = Split(
    rf"{_layer}attn\.qkv\.(weight|bias)",
    [rf"{_native_layer}attention.{name}_proj.\2" for name in "qkv"],
    split_qkv,
)
_internlm2_renames, _internlm2_splits = internlm2.rules(
    r"language_model\.", "model.language_model.", lambda config: config["llm_config"]
)

INTERNVL_CHAT = Layout(
    name="internvl_chat",
    model_types=frozenset({"internvl_chat"}),
    config=native_config,
    renames=[*_VISION, *_PROJECTOR, *_internlm2_renames, *_TEXT],
    splits=[_QKV, *_internlm2_splits],
    files=lambda config, directory: native_files(read_config(config), directory),
)
