"""InternLM2: a Llama with other names, whose queries, keys and values are rows of one weight, ``wqkv``.

For every key/value head, ``wqkv`` holds the query heads that share it, then its key head, then its value head. Both
halves of a head are rotated as in Llama, so rows are moved and no number changes. These are the rules for text models,
and for the language model inside InternVL.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_object
from emloc_core.layout import Layout, Split

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]

#: Fields that Llama has under the same name, with the defaults of InternLM2's config class.
SAME_FIELDS: dict[str, Any] = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 10000,
    "rope_scaling": None,
}


def llama_config(config: Config) -> dict[str, Any]:
    """Return the config of the Llama that equals an InternLM2."""
    same = {name: config.get(name, default) for name, default in SAME_FIELDS.items()}
    same = {name: value for name, value in same.items() if value is not None}
    same.setdefault("num_key_value_heads", same["num_attention_heads"])
    return {"model_type": "llama", **same, "attention_bias": config.get("bias", True), "use_cache": True}


def split_wqkv(wqkv: "torch.Tensor", config: Config) -> "Iterable[torch.Tensor]":
    """Yield the rows of q_proj, k_proj and v_proj.

    Args:
        wqkv: of shape ((n + 2) * key/value heads * d, ...), where n query heads of size d share a key/value head.
        config: InternLM2's config.
    """
    llama = llama_config(config)
    heads, groups = llama["num_attention_heads"], llama["num_key_value_heads"]
    shared = heads // groups
    by_group = wqkv.unflatten(0, (groups, shared + 2, llama["hidden_size"] // heads))
    for rows in by_group.split([shared, 1, 1], dim=1):
        yield rows.flatten(0, 2)


def rules(source: str, native: str, section: Callable[[Config], Config]) -> tuple[list[tuple[str, str]], list[Split]]:
    """Return the renamings and the splits.

    Args:
        source: regular expression of the prefix of ``model.`` and ``output.`` in the source's keys.
        native: prefix of ``layers.`` in the native keys.
        section: takes InternLM2's config out of the source's.
    """
    layer, native_layer = rf"{source}model\.layers\.(\d+)\.", rf"{native}layers.\1."
    renames = [
        (rf"{source}model\.tok_embeddings\.weight", f"{native}embed_tokens.weight"),
        (rf"{source}model\.norm\.weight", f"{native}norm.weight"),
        (rf"{source}output\.weight", "lm_head.weight"),
        (rf"{layer}attention_norm\.weight", f"{native_layer}input_layernorm.weight"),
        (rf"{layer}attention\.wo\.(weight|bias)", rf"{native_layer}self_attn.o_proj.\2"),
        (rf"{layer}ffn_norm\.weight", f"{native_layer}post_attention_layernorm.weight"),
        (rf"{layer}feed_forward\.w1\.weight", f"{native_layer}mlp.gate_proj.weight"),
        (rf"{layer}feed_forward\.w3\.weight", f"{native_layer}mlp.up_proj.weight"),
        (rf"{layer}feed_forward\.w2\.weight", f"{native_layer}mlp.down_proj.weight"),
    ]
    wqkv = Split(
        rf"{layer}attention\.wqkv\.(weight|bias)",
        [rf"{native_layer}self_attn.{name}_proj.\2" for name in "qkv"],
        lambda tensor, config: split_wqkv(tensor, section(config)),
    )
    return renames, [wqkv]


def tokenizer_files(directory: Path) -> dict[str, dict[str, Any] | str | None]:
    """Return the files of InternLM2's tokenizer for transformers' class; its own class is code that is not run.

    Raises:
        EmlocError: the directory has no tokenizer, or one that cannot be converted.
    """
    settings = read_object(directory / "tokenizer_config.json")
    settings.pop("auto_map", None)
    settings.update(tokenizer_class="PreTrainedTokenizerFast", legacy=False)
    files: dict[str, dict[str, Any] | str | None] = {"tokenizer_config.json": settings}
    if (directory / "tokenizer.json").is_file():
        return files
    if not (directory / "tokenizer.model").is_file():
        raise EmlocError(
            f"{directory} has neither a tokenizer.json nor a tokenizer.model.",
            "Copy the one that was published with the model into the directory.",
        )
    from emloc_internvl.sentencepiece_bpe import fast_tokenizer

    # These give their tokens the ids of unused pieces, which they rename.
    return {**files, "tokenizer.json": fast_tokenizer(directory, settings), "tokenizer.model": None,
            "added_tokens.json": None}  # fmt: skip


def _native_config(config: Config, _directory: Path) -> dict[str, Any]:
    dtype = config.get("torch_dtype") or config.get("dtype")
    return {"architectures": ["LlamaForCausalLM"], **llama_config(config), **({"dtype": dtype} if dtype else {})}


_renames, _splits = rules("", "model.", lambda config: config)

INTERNLM2 = Layout(
    name="internlm2",
    model_types=frozenset({"internlm2"}),
    config=_native_config,
    renames=_renames,
    splits=_splits,
    files=lambda _config, directory: tokenizer_files(directory),
)
