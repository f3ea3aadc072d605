"""A byte-level tokenizer in GGUF's terms."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emloc_core.data.tokenize import load_tokenizer
from emloc_core.files.documents import read_object
from emloc_core.layout import Gguf
from emloc_core.serving.unsupported import unsupported

_ONLY = "Only byte-level BPE, as in tokenizer.json of Llama 3, SmolLM and Qwen, is written."


def add_vocabulary(writer: Any, directory: Path, size: int, layout: Gguf) -> None:
    """Add a model's tokenizer to a GGUF file.

    Args:
        writer: ``gguf.GGUFWriter``.
        size: number of token ids of the model, which may be more than the tokenizer has.

    Raises:
        EmlocError: the tokenizer is of another kind, or splits text as the family's declaration does not know.
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
        raise unsupported(f"The tokenizer in {directory} has the token {largest}, and the model {size} tokens.")
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


def _parts(found: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a pre-tokenizer."""
    yield from (found or {}).get("pretokenizers", [found] if found else [])


def _key(part: dict[str, Any]) -> str | None:
    """Return what a step does to the text; see :class:`emloc_core.layout.Gguf`."""
    if part["type"] == "Split":
        return str(part["pattern"].get("Regex", part["pattern"]))
    if part["type"] == "ByteLevel":
        return "words" if part.get("use_regex", True) else None
    return str(part["type"]).lower()
