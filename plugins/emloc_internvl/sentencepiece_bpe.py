"""Turns a SentencePiece model of the BPE kind (``tokenizer.model``) into a ``tokenizer.json``.

The few fields that matter are read from the protocol buffer here: neither SentencePiece nor protobuf is needed.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from emloc_core.errors import EmlocError
from emloc_internvl.tokens import token_ids

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# SentencePiece.Type and TrainerSpec.ModelType in sentencepiece_model.proto
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2


@dataclass(frozen=True)
class Piece:
    """A token: its text, its score (a pair is merged the sooner, the higher that of the whole), and its kind."""

    text: str
    score: float
    kind: int


def fast_tokenizer(directory: Path, settings: Mapping[str, Any]) -> str:
    """Return the ``tokenizer.json`` of a directory's ``tokenizer.model``.

    Args:
        directory: of the model; what tokens are added, and with which ids, is taken from its other files.
        settings: the content of its ``tokenizer_config.json``.

    Raises:
        EmlocError: the file is damaged or not of the BPE kind, or the ids leave gaps.
    """
    path = directory / "tokenizer.model"
    try:
        pieces, normalizer_spec = _read(path)
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise EmlocError(f"{path} is no SentencePiece model of the BPE kind ({error}).", "Copy it again.") from None
    added = token_ids(directory)
    texts = [piece.text for piece in pieces]
    for token, index in added.items():
        if index < len(texts):
            texts[index] = token
    if len(set(texts)) < len(texts):
        raise EmlocError(f"{path} has two tokens of the same text.", "Copy the tokenizer's files again.")
    kept = [piece for piece, text in zip(pieces, texts, strict=True) if piece.text == text and piece.kind == _NORMAL]
    unknown = next((text for piece, text in zip(pieces, texts, strict=True) if piece.kind == _UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            {text: index for index, text in enumerate(texts)},
            _merges(kept),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(piece.kind == _BYTE for piece in pieces),
        )
    )
    dummy_prefix = bool(normalizer_spec.get(3, True))
    steps: list[Any] = []
    if normalizer_spec.get(4, True):  # remove_extra_whitespaces
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_tokens(tokenizer, pieces, texts, added, path)
    bos = settings.get("bos_token")
    bos = bos["content"] if isinstance(bos, dict) else bos
    if bos and settings.get("add_bos_token", True):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    text: str = tokenizer.to_str(pretty=True)
    return text


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes another, the best first: what SentencePiece merges by, as ranks."""
    known = {piece.text for piece in pieces}
    found = []
    for piece in sorted(pieces, key=lambda piece: -piece.score):
        text = piece.text
        found += [(text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in known and text[at:] in known]
    return found


def _add_tokens(
    tokenizer: Tokenizer, pieces: list[Piece], texts: list[str], added: Mapping[str, int], path: Path
) -> None:
    """Mark the tokens that are never made by merging, and add those that come after the pieces."""
    kinds = {text: piece.kind for piece, text in zip(pieces, texts, strict=True)}
    for text, kind in kinds.items():
        if kind in (_UNKNOWN, _CONTROL) or text in added:
            tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=False)])
    for token, index in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if tokenizer.token_to_id(token) != index:
            raise EmlocError(
                f"The files beside {path} give {token!r} the id {index}, where {tokenizer.token_to_id(token)} is next.",
                "Copy tokenizer_config.json and added_tokens.json of this model again.",
            )


def _read(path: Path) -> tuple[list[Piece], dict[int, Any]]:
    """Return the pieces in the order of their ids, and the NormalizerSpec's fields by number."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(path.read_bytes()):
        if number == 1:
            fields = dict(_fields(value))
            (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
            pieces.append(Piece(fields[1].decode(), score, fields.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces or trainer.get(3, 1) != _BPE:
        raise ValueError(f"{len(pieces)} pieces, model type {trainer.get(3, 1)}")
    if normalizer.get(2):
        raise ValueError("it has a table of characters to normalise")
    return pieces, normalizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a message of the protocol buffers' wire format: an int, or the value's bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + length > len(data):
            raise ValueError("it ends within a field")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that starts at ``at``, seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
