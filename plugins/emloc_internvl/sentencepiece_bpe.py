"""Turns a SentencePiece model of the BPE kind (``tokenizer.model``) into a ``tokenizer.json``.

transformers' own conversion works only for tokenizer classes that it knows; here, files beside the model rename pieces.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from emloc_core.errors import EmlocError
from emloc_internvl.tokens import token_ids

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def fast_tokenizer(directory: Path, settings: Mapping[str, Any]) -> str:
    """Return the ``tokenizer.json`` of a directory's ``tokenizer.model``.

    Args:
        directory: directory of the model, whose other files say which tokens are added, with which ids.
        settings: the content of its ``tokenizer_config.json``.

    Raises:
        EmlocError: see :func:`_read`; or the ids leave gaps.
    """
    path = directory / "tokenizer.model"
    model = _read(path)
    pieces = list(model.pieces)
    added = token_ids(directory)
    texts = [piece.piece for piece in pieces]
    for token, index in added.items():
        if index < len(texts):
            texts[index] = token
    if len(set(texts)) < len(texts):
        raise EmlocError(f"{path} has two tokens of the same text.", "Copy the tokenizer's files again.")
    unchanged = [
        piece for piece, text in zip(pieces, texts, strict=True) if piece.piece == text and piece.type == piece.NORMAL
    ]
    unknown = next((text for piece, text in zip(pieces, texts, strict=True) if piece.type == piece.UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            {text: index for index, text in enumerate(texts)},
            _merges(unchanged),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(piece.type == piece.BYTE for piece in pieces),
        )
    )
    dummy_prefix = model.normalizer_spec.add_dummy_prefix
    steps: list[Any] = []
    if model.normalizer_spec.remove_extra_whitespaces:
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
    return tokenizer.to_str(pretty=True)


def _merges(pieces: list[Any]) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes another one, the best first: SentencePiece's merges, as ranks."""
    texts = {piece.piece for piece in pieces}
    merges = []
    for piece in sorted(pieces, key=lambda piece: -piece.score):
        text = piece.piece
        merges += [
            (text[:index], text[index:])
            for index in range(1, len(text))
            if text[:index] in texts and text[index:] in texts
        ]
    return merges


def _add_tokens(
    tokenizer: Tokenizer, pieces: list[Any], texts: list[str], added: Mapping[str, int], path: Path
) -> None:
    """Mark the tokens that are never made by merging, and add the tokens that come after the pieces."""
    for piece, text in zip(pieces, texts, strict=True):
        if piece.type in (piece.UNKNOWN, piece.CONTROL) or text in added:
            tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif piece.type == piece.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=False)])
    for token, index in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if tokenizer.token_to_id(token) != index:
            raise EmlocError(
                f"The files beside {path} give {token!r} the id {index}, where {tokenizer.token_to_id(token)} is next.",
                "Copy tokenizer_config.json and added_tokens.json of this model again.",
            )


def _read(path: Path) -> Any:
    """Return the SentencePiece model, a ``ModelProto``.

    Raises:
        EmlocError: it is damaged, of another kind, or normalises characters; or SentencePiece is not installed.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
    except ImportError:
        raise EmlocError(
            f"Reading {path} needs SentencePiece, which is not installed.", "pip install 'emloc[import]'"
        ) from None
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise EmlocError(f"{path} is not a SentencePiece model ({error}).", "Copy it again.") from None
    if not model.pieces or model.trainer_spec.model_type != TrainerSpec.BPE:
        description = f"{len(model.pieces)} pieces, model type {model.trainer_spec.model_type}"
        raise EmlocError(f"{path} is not a SentencePiece model of the BPE kind ({description}).", "Copy it again.")
    if model.normalizer_spec.precompiled_charsmap:
        raise EmlocError(
            f"{path} has a table of characters to normalise, which is not converted.",
            "Put a tokenizer.json for it into the directory.",
        )
    return model
