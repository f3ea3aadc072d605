"""Turns rows into model inputs: the same token ids, and the same tokens in the loss, as in TRL's ``SFTTrainer``.

The emulator must be fitted to what will be trained on, so this matches TRL token for token: the end-of-sequence token
added to plain text, the chat template (:mod:`emloc_core.data.chat_template`), the start of the completion, truncation.
A test compares the two. Rows with images go through the model's own processor, in TRL's own collator.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedTokenizerBase

from emloc_core.data.chat_template import Encoded, encode_conversations, from_start, require_template
from emloc_core.data.images import pillow
from emloc_core.data.limits import Limits
from emloc_core.data.messages import ROLES, in_parts
from emloc_core.data.row import Row
from emloc_core.data.starts import common_prefix, token_ids
from emloc_core.errors import EmlocError, first_line
from emloc_core.family import Family
from emloc_core.files import pretrained

if TYPE_CHECKING:
    from transformers import ProcessorMixin  # which imports the base class of every model: two seconds

#: Turns rows into a model's inputs: its tokenizer or, for rows with images, its processor.
Processing: TypeAlias = "PreTrainedTokenizerBase | ProcessorMixin"


@dataclass(frozen=True)
class Sample:
    """One sequence of T tokens.

    Attributes:
        input_ids: T token ids.
        completion_mask: T times 0 or 1: whether the token counts in the loss; all 1 for a row of text.
        row: name of its row in messages.
        others: the model's other inputs by name, in the shapes that its processor returns: ``pixel_values``, and
            whatever else it takes for images.
    """

    input_ids: list[int]
    completion_mask: list[int]
    row: str
    others: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def inputs(self, device: torch.device | str) -> dict[str, torch.Tensor]:
        """Return all inputs on ``device``: besides ``others``, ``input_ids`` and an ``attention_mask`` of ones.

        These two are of shape (1, T), int64.
        """
        ids = torch.tensor([self.input_ids], dtype=torch.int64, device=device)
        others = {name: tensor.to(device) for name, tensor in self.others.items()}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **others}

    @property
    def size(self) -> int:
        """T."""
        return len(self.input_ids)

    def run(self, model: Any, device: torch.device | str) -> Any:
        """Pass through a model, and return its outputs."""
        return model(**self.inputs(device), use_cache=False)

    def loss(self, model: Any, device: torch.device | str) -> torch.Tensor:
        """Pass through a model; return the loss, summed over the tokens that count, and their number, (2,), fp64.

        Where the model can leave out logits, only those that predict these tokens are computed.
        """
        inputs = self.inputs(device)
        before = torch.tensor(self.completion_mask[1:]).nonzero()[:, 0]  # predict the next
        logits = logits_at(model, inputs, before)[0]
        loss = nn.functional.cross_entropy(logits.float(), inputs["input_ids"][0, before + 1], reduction="sum")
        return torch.tensor([float(loss), len(before)], dtype=torch.float64)


def logits_at(model: Any, inputs: Mapping[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Return the logits at some positions of a batch, (B, P, vocabulary); others are left out where the model can.

    Args:
        positions: (P,), int64; on the CPU, if the model's layers may be on several devices. (A number of last positions
            would do for transformers, too, but it slices: the product with a frozen weight then copies the weight for
            each row on a CPU.)
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        return model(**inputs, logits_to_keep=positions, use_cache=False).logits
    return model(**inputs, use_cache=False).logits[:, positions]


def load_processing(directory: Path, family: Family, rows: Sequence[Row]) -> Processing:
    """Return the model's tokenizer, or its processor if the rows have images.

    Raises:
        EmlocError: a row has images and the model reads only text, or the directory lacks the files needed.
    """
    require_readable(rows, family)
    if family.modality == "text" or all(row.images is None for row in rows):
        return load_tokenizer(directory)
    return load_processor(directory)


#: Files that hold a tokenizer's vocabulary, whatever its kind.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside a model.

    Raises:
        EmlocError: there is none, or it cannot be loaded.
    """
    # Without a vocabulary transformers makes an empty tokenizer, for which every row is one unknown token.
    if not any(path.match(pattern) for pattern in _VOCABULARIES for path in directory.iterdir()):
        raise EmlocError(
            f"{directory} has no tokenizer.",
            "Copy the model's tokenizer.json and tokenizer_config.json there.",
            code="missing",
        )
    return _load("AutoTokenizer", directory, "tokenizer")


def load_processor(directory: Path) -> "ProcessorMixin":
    """Return the processor of an image-text model, with a tokenizer that can pad.

    Raises:
        EmlocError: there is none, or packages that it needs are missing.
    """
    pillow()  # without it, transformers would complain about the file's contents
    processor = _load("AutoProcessor", directory, "processor")
    from transformers import ProcessorMixin

    if not isinstance(processor, ProcessorMixin):
        raise EmlocError(
            f"{directory} has no processor, so images cannot be read.",
            "Copy the model's preprocessor_config.json and processor_config.json there.",
            code="missing",
        )
    tokenizer: Any = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as TRL does
    return processor


def require_readable(rows: Iterable[Row], family: Family) -> None:
    """Refuse rows with images for a model that reads only text, and pictures to learn."""
    rows = list(rows)
    pictured = next((row for row in rows if row.images), None)
    if pictured and family.modality == "text":
        raise EmlocError(
            f"{pictured.name} has images, but models of the family {family.name} read only text.",
            "Give a model for images and text, or rows without images.",
            code="mismatch",
        )
    if drawn := next((row for row in rows if row.form == "picture"), None):
        raise EmlocError(
            f"{drawn.name} is a picture and its prompt, but models of the family {family.name} only read pictures.",
            "Give a model that makes pictures, or rows with an answer: messages, or prompt and completion.",
            code="mismatch",
        )


def _load(auto_class: str, directory: Path, kind: str) -> Any:
    try:
        return pretrained.load_processing(auto_class, directory)
    except ImportError as error:
        raise EmlocError(
            f"The {kind} in {directory} needs more packages: {first_line(error)}",
            "pip install 'emloc[vision]'",
            code="unavailable",
            resumable=True,
        ) from error
    except EmlocError:
        raise
    except Exception as error:  # transformers and tokenizers check little, and raise exceptions of any type
        raise EmlocError(
            f"The {kind} in {directory} cannot be loaded ({first_line(error)}).",
            f"Copy the files of the model's {kind} there.",
            code="missing",
            resumable=True,
        ) from error


_NO_LIMITS = Limits()


def encode(
    rows: Iterable[Row],
    processing: Processing,
    max_length: int | None = None,
    limits: Limits = _NO_LIMITS,
    dtype: torch.dtype = torch.float32,
) -> list[Sample]:
    """Tokenize rows as TRL does, one sample per row.

    Args:
        processing: the model's tokenizer or processor; see :func:`load_processing`.
        max_length: maximum tokens per sequence, beyond which it is truncated; None truncates nothing.
        dtype: dtype of the model's floating-point inputs.

    Raises:
        EmlocError: a row cannot be tokenized, is longer than the model's limit, or has no tokens left in the loss; the
            message names the row.
    """
    rows = list(rows)
    samples = list(tokenized(rows, processing, max_length, limits, dtype))
    for row, sample in zip(rows, samples, strict=True):
        if not any(sample.completion_mask):
            raise no_room_for_an_answer(f"{row.name}: its", row, max_length)
    return samples


def no_room_for_an_answer(whose: str, row: Row, max_length: int | None) -> EmlocError:
    """Return the error for a prompt like that of ``row``: ``whose`` begins the sentence."""
    prompt = "prompt with its images" if row.images else "prompt"
    return EmlocError(
        f"{whose} {prompt} alone fills the {max_length} tokens of the maximum length.",
        "Raise the maximum length, or shorten the prompts.",
    )


#: Rows that are tokenized together.
_AT_ONCE = 256


def tokenized(
    rows: Iterable[Row],
    processing: Processing,
    max_length: int | None = None,
    limits: Limits = _NO_LIMITS,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Sample]:
    """Yield the sample of every row, as :func:`encode` does; truncation may leave some without any token that counts.

    Raises:
        EmlocError: a row cannot be tokenized, or is longer than the model's limit; the message names it.
    """
    if not isinstance(processing, PreTrainedTokenizerBase):
        for row in rows:
            yield _within(limits, row, _with_images(row, processing, max_length, dtype))
        return
    remaining = iter(rows)
    while batch := list(islice(remaining, _AT_ONCE)):
        encoded = encode_conversations if batch[0].form == "conversation" else _plain
        for row, (ids, mask) in zip(batch, encoded(batch, processing), strict=True):
            if not any(mask):
                raise EmlocError(f"{row.name}: the tokenizer leaves no tokens to learn.", "Leave the row out.")
            yield _within(limits, row, Sample(ids[:max_length], mask[:max_length], row.name))


def _within(limits: Limits, row: Row, sample: Sample) -> Sample:
    """Return the sample of a row; refuse one that the model does not take."""
    if limits.tokens is not None and len(sample.input_ids) > limits.tokens:
        raise EmlocError(
            f"{row.name} has {len(sample.input_ids)} tokens, but the model takes {limits.tokens}.",
            f"Truncate it with --max-length {limits.tokens}, or leave the row out.",
        )
    largest = max(sample.input_ids, default=0)
    if limits.vocabulary is not None and largest >= limits.vocabulary:
        raise EmlocError(
            f"{row.name}: the tokenizer gives the id {largest}, but the model has {limits.vocabulary} ids.",
            "Use the tokenizer that belongs to the model.",
            code="mismatch",
        )
    return sample


def trl_example(row: Row) -> dict[str, Any]:
    """Return a conversation as TRL's collator takes it: prompt and completion in parts, and its decoded images.

    Raises:
        EmlocError: an image cannot be read.
    """
    assert isinstance(row.prompt, list)
    assert isinstance(row.completion, list)
    try:
        images = [picture.read() for picture in row.images or ()]
    except EmlocError as error:
        raise EmlocError(f"{row.name}: {error.args[0]}", error.fix, code=error.code) from None
    return {"prompt": in_parts(row.prompt), "completion": in_parts(row.completion), "images": images}


def _with_images(row: Row, processor: "ProcessorMixin", max_length: int | None, dtype: torch.dtype) -> Sample:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling  # heavy, and needed only here

    if row.loss == "all":
        raise EmlocError(
            f"{row.name}: the loss on all answers is not supported for rows with images.",
            "Use --loss last.",
            code="unsupported",
        )
    collate = DataCollatorForVisionLanguageModeling(processor, max_length=max_length, completion_only_loss=True)
    require_template(row, processor)
    try:
        batch = collate([trl_example(row)])
    except (TemplateError, ValueError, IndexError, StopIteration) as error:
        raise EmlocError(
            f"{row.name}: the model's processor rejects it ({error}).",
            f"{ROLES} Correct them and their order, remove special tokens from the text, or leave the row out.",
        ) from error
    ids, labels, _ = (batch.pop(name)[0] for name in ("input_ids", "labels", "attention_mask"))
    others = {name: value.to(dtype) if value.is_floating_point() else value
              for name, value in batch.items() if isinstance(value, torch.Tensor)}  # fmt: skip
    return Sample(ids.tolist(), (labels != -100).int().tolist(), row.name, others)


def _plain(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Encode texts, or prompts and completions, each in one string."""
    end = tokenizer.eos_token
    if end is None:
        raise EmlocError(
            "The tokenizer has no end-of-sequence token, so a model cannot learn where an answer ends.",
            "Set eos_token in the model's tokenizer_config.json.",
        )
    texts: list[Any] = [row.completion if row.text is None else row.text for row in rows]
    texts = [text if text.endswith(end) else f"{text}{end}" for text in texts]
    prompts: list[Any] = [row.prompt or "" for row in rows]
    joined = [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]
    ids = token_ids({*prompts, *joined}, tokenizer, special=True)
    return [
        from_start(ids[text], common_prefix(ids[prompt], ids[text]) if prompt else 0)
        for prompt, text in zip(prompts, joined, strict=True)
    ]
