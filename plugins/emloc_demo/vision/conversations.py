"""Batches for pretraining: random pictures, with questions and answers about each."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from emloc_demo.vision.pictures import COLOURS, GRID, Digits, Picture
from emloc_demo.vision.processor import ASSISTANT, CONTEXT, END, IMAGE_TOKENS, START, STOP, USER
from emloc_demo.vision.rows import random_pictures

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

#: Questions about each picture in one conversation: much of a step's cost is the picture.
QUESTIONS_A_PICTURE = 3
#: Labels that the loss leaves out.
IGNORED = -100
#: Labels of a cell without a digit: its digit, its colour.
NO_DIGIT, NO_COLOUR = 10, len(COLOURS)


class Conversations:
    """Makes batches, always new ones; the same seed gives the same sequence."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", digits: Digits, seed: int) -> None:
        import numpy

        self.tokenizer, self.digits = tokenizer, digits
        self.draw = numpy.random.default_rng(seed)
        self._encode = cache(lambda text: tokenizer.encode(text, add_special_tokens=False))

    def batch(self, size: int) -> tuple[dict[str, "torch.Tensor"], list[Picture]]:
        """Return a model's inputs for conversations about ``size`` pictures, as the processor makes them; the pictures.

        The inputs: ``input_ids``, ``attention_mask`` and ``labels``, int64 (size, tokens), padded on the right; and
        ``pixel_values``, fp32 (size, 3, SIDE, SIDE).
        """
        pictures = random_pictures(self.digits, size, self.draw)
        conversations = []
        for picture in pictures:
            questions = picture.questions()
            order = self.draw.permutation(len(questions))[:QUESTIONS_A_PICTURE]
            conversations.append([questions[index] for index in order])
        return self.inputs(pictures, conversations), pictures

    def inputs(
        self, pictures: Sequence[Picture], conversations: Iterable[Sequence[tuple[str, str]]]
    ) -> dict[str, "torch.Tensor"]:
        """Return the model's inputs for one conversation about each picture, as :meth:`batch` does."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        tokens = [self._tokens(turns) for turns in conversations]
        ids, labels = ([torch.tensor(row) for row in column] for column in zip(*tokens, strict=True))
        pixels = torch.stack([torch.from_numpy(picture.pixels) for picture in pictures]).permute(0, 3, 1, 2)
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "pixel_values": pixels / 127.5 - 1,
        }

    def _tokens(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Return the ids of a conversation by the chat template, and their labels: only answers are learned."""
        ids: list[int] = []
        labels: list[int] = []
        picture = START + CONTEXT * IMAGE_TOKENS + STOP  # before the first question
        for question, answer in turns:
            prompt, completion = self._encode(USER + picture + question + END + ASSISTANT), self._encode(answer + END)
            ids += prompt + completion
            labels += [IGNORED] * len(prompt) + completion
            picture = ""
        return ids, labels


def cell_labels(pictures: Sequence[Picture]) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return what is in each cell of each picture: digits and colours, int64 (pictures, cells)."""
    import torch

    digits = torch.full((len(pictures), GRID * GRID), NO_DIGIT)
    colours = torch.full_like(digits, NO_COLOUR)
    for row, picture in enumerate(pictures):
        cells = list(picture.cells)
        digits[row, cells] = torch.tensor(picture.digits)
        colours[row, cells] = torch.tensor([list(COLOURS).index(colour) for colour in picture.colours])
    return digits, colours
