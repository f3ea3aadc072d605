"""GGUF files of a model with its byte-level tokenizer, and of a LoRA, written a tensor at a time."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from emloc_core.algorithms.lora import Lora
from emloc_core.data.tokenize import load_tokenizer
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.documents import read_object
from emloc_core.files.job import Progress
from emloc_core.layout import Gguf
from emloc_core.model.opened import OpenModel
from emloc_core.plugins.manager import plugin_manager

if TYPE_CHECKING:
    from gguf import GGUFWriter

#: Name of a tensor in the file, its shape, and a function that reads it.
_Tensor = tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]
_BLOCK = 32  # numbers that share a scale in q8_0
#: Other parameters of YaRN, with the values that readers assume.
_YARN = {"attention_factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None}
_ONLY = "Only byte-level BPE can be written, from tokenizer.json."


def require_gguf(model: OpenModel) -> Gguf:
    """Return how a model is written as GGUF.

    Raises:
        EmlocError: no plugin declares it, or the package ``gguf`` is missing.
    """
    model_type = model.checkpoint.config["model_type"]
    layout = plugin_manager().gguf_for(model_type)
    if layout is None:
        raise unsupported(f"Models of type {model_type} cannot be written as GGUF here.")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise EmlocError("GGUF needs the package gguf.", "pip install 'emloc[gguf]'", code="unavailable") from None
    return layout


class GgufFile:
    """A GGUF file before it is written.

    Attributes:
        dtype: of its matrices.
    """

    def __init__(self, writer: "GGUFWriter", tensors: Sequence[_Tensor], dtype: str) -> None:
        self._writer, self._tensors, self.dtype = writer, tensors, dtype

    def write(self, target: Path, progress: Progress) -> int:
        """Write the header, then one tensor after the other, and return their number.

        Args:
            progress: called for every tensor that is written.
        """
        from gguf import GGMLQuantizationType, quantize
        from gguf.quants import quant_shape_to_byte_shape

        def kind(shape: tuple[int, ...]) -> "GGMLQuantizationType":
            if len(shape) < 2:
                return GGMLQuantizationType.F32
            name = self.dtype if self.dtype != "q8_0" or shape[-1] % _BLOCK == 0 else "f16"
            return GGMLQuantizationType[name.upper()]

        target.unlink(missing_ok=True)  # of an interrupted run
        tensors = self._tensors
        with closing(self._writer) as writer:
            for name, shape, _ in tensors:
                stored = quant_shape_to_byte_shape(shape, kind(shape))
                size = int(numpy.prod(stored))
                writer.add_tensor_info(name, stored, numpy.dtype(numpy.uint8), size, raw_dtype=kind(shape))
            writer.write_header_to_file(target)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, (name, shape, read) in enumerate(tensors, 1):
                data = quantize(numpy.ascontiguousarray(read().float().numpy()), kind(shape))
                writer.write_tensor_data(numpy.ascontiguousarray(data).view(numpy.uint8))
                progress(name, done, len(tensors))
        return len(tensors)


def model_file(model: OpenModel, dtype: str) -> GgufFile:
    """Return the file of a model with its tokenizer; of the weights nothing is read yet.

    Args:
        model: the model, unquantised.
        dtype: dtype of the matrices: ``f32``, ``f16``, ``bf16`` or ``q8_0``.

    Raises:
        EmlocError: the model or its tokenizer has something that the format does not express, or see
            :func:`require_gguf`.
    """
    layout, config = require_gguf(model), model.config.get_text_config()
    writer = _writer(layout, config)
    writer.add_type("model")
    _add_sizes(writer, config, dtype)
    add_vocabulary(writer, model.checkpoint.directory, config.vocab_size, layout)
    tensors = list(_model_tensors(model.checkpoint, layout, config))
    if factors := _rope_factors(config):
        tensors.append(factors)
    return GgufFile(writer, tensors, dtype)


def lora_file(loras: Mapping[str, Lora], base: OpenModel, dtype: str) -> GgufFile:
    """Return the file of a LoRA for a model.

    Args:
        loras: by module path, as :func:`emloc_core.serving.plain.plain` returns them.
        dtype: dtype of the matrices: ``f32``, ``f16`` or ``bf16``.

    Raises:
        EmlocError: a LoRA is on a Linear that the format does not name, or see :func:`require_gguf`.
    """
    layout, config = require_gguf(base), base.config.get_text_config()
    writer = _writer(layout, config)
    rank = next(iter(loras.values())).a.shape[0]
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    names = _Names(layout, config)
    tensors: list[_Tensor] = []
    for path, lora in loras.items():
        name = names.name_for(f"{path}.weight")
        b = _paired(lora.b, path, layout, config)
        tensors += [(f"{name}.lora_a", tuple(lora.a.shape), lambda a=lora.a: a)]  # type: ignore[misc]
        tensors += [(f"{name}.lora_b", tuple(b.shape), lambda b=b: b)]  # type: ignore[misc]
    return GgufFile(writer, tensors, dtype)


def _writer(layout: Gguf, config: Any) -> "GGUFWriter":
    from gguf import GGUFWriter

    return GGUFWriter(None, layout.architectures[config.model_type])


def _add_sizes(writer: "GGUFWriter", config: Any, dtype: str) -> None:
    """Add the config's sizes, in GGUF's terms."""
    from gguf import LlamaFileType, RopeScalingType

    head, rope = _head_size(config), config.rope_parameters
    if getattr(config, "sliding_window", None) or config.hidden_act != "silu":
        raise unsupported("Sliding-window attention, or an activation other than silu, cannot be written here.")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            if changed := [name for name, usual in _YARN.items() if rope.get(name) not in (None, usual)]:
                raise unsupported(f"The model sets {', '.join(changed)} of YaRN, which cannot be written here.")
            original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(int(original))
    elif kind not in ("default", "llama3"):
        raise unsupported(f"The model scales positions by {kind!r}, which cannot be written here.")


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_factors(config: Any) -> _Tensor | None:
    """Return llama.cpp's divisors of the rotary frequencies, (head_dim / 2,), if the model has them (``llama3``)."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    factors = plain / scaled
    return "rope_freqs.weight", tuple(factors.shape), lambda: factors


def _model_tensors(model: Checkpoint, layout: Gguf, config: Any) -> Iterator[_Tensor]:
    tied, names = config.tie_word_embeddings, _Names(layout, config)
    for key, tensor in sorted(model.tensors.items()):
        if (tied and key == "lm_head.weight") or re.search(r"rotary_emb\.inv_freq$", key):
            continue

        def read(key: str = key) -> torch.Tensor:
            with model.slices([key]) as slices:
                return _paired(slices[key][...], key.rpartition(".")[0], layout, config)

        yield names.name_for(key), tensor.shape, read


class _Names:
    """GGUF's names of a model's tensors."""

    def __init__(self, layout: Gguf, config: Any) -> None:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        name = layout.architectures[config.model_type]
        architecture = next(member for member in MODEL_ARCH if MODEL_ARCH_NAMES[member] == name)
        self._names = get_tensor_name_map(architecture, config.num_hidden_layers)

    def name_for(self, key: str) -> str:
        """Return the name of the tensor at a key of the checkpoint."""
        name = self._names.get_name(key, (".weight", ".bias"))
        if name is None:
            raise unsupported(f"GGUF has no name for {key}.")
        return name


def _paired(tensor: torch.Tensor, path: str, layout: Gguf, config: Any) -> torch.Tensor:
    """Return a tensor of m rows, with the rows of each head's halves interleaved if llama.cpp rotates pairs of them."""
    if not path.endswith(tuple(f".{end}" for end in layout.paired)):
        return tensor
    halves = tensor.reshape(-1, 2, _head_size(config) // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def unsupported(message: str) -> EmlocError:
    """Return the error for something that a GGUF file of ours cannot hold."""
    fix = "Convert the merged model with llama.cpp's own convert_hf_to_gguf.py."
    return EmlocError(message, fix, code="unsupported")


def add_vocabulary(writer: Any, directory: Path, size: int, layout: Gguf) -> None:
    """Add a model's tokenizer to a GGUF file.

    Args:
        writer: ``gguf.GGUFWriter``.
        size: number of token ids of the model, which may be more than the tokenizer has.

    Raises:
        EmlocError: the tokenizer is of another kind, or splits text in a way that the family does not declare.
    """
    from gguf import SpecialVocab, TokenType

    load_tokenizer(directory)  # refuses what is damaged, or needs its own code
    content = read_object(directory / "tokenizer.json")
    model = content.get("model") or {}
    parts = list(_parts(content.get("pre_tokenizer")))
    if model.get("type") != "BPE" or not any(part["type"] == "ByteLevel" for part in parts):
        raise unsupported(f"The tokenizer in {directory} cannot be written as GGUF. {_ONLY}")
    split = "+".join(filter(None, map(_key, parts)))
    if split not in layout.splits:
        raise unsupported(f"The tokenizer in {directory} splits text by {split!r}, which the family does not declare.")
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    largest = max([*model["vocab"].values(), *(added["id"] for added in content.get("added_tokens", []))])
    if largest >= size:
        raise unsupported(
            f"The tokenizer in {directory} has the token {largest}, but the model has only {size} tokens."
        )
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, int(TokenType.NORMAL)
    for added in content.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(layout.splits[split])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    SpecialVocab(directory, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _parts(step: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a pre-tokenizer."""
    yield from (step or {}).get("pretokenizers", [step] if step else [])


def _key(part: dict[str, Any]) -> str | None:
    """Return how a step splits text; see :class:`emloc_core.layout.Gguf`."""
    if part["type"] == "Split":
        return str(part["pattern"].get("Regex", part["pattern"]))
    if part["type"] == "ByteLevel":
        return "words" if part.get("use_regex", True) else None
    return str(part["type"]).lower()
