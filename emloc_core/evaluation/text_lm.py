"""lm-eval's model for text, whose answers begin where they do in tuning, and are scored in little memory.

Some chat templates write more before an answer than their prompt for one has, such as an empty block of thoughts. Tuned
models write it themselves. So answers are scored after it, and it is removed from generated text. The prompt of others
has more than they write before an answer, such as the start of thoughts: models are prompted without it.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence

from emloc_core.compat.lm_eval import ScoresTokens
from emloc_core.data.chat_template import AnswerRender, as_written, lead, question
from emloc_core.errors import EmlocError
from emloc_core.evaluation.likelihood import likelihoods, logits_before


class TextLM(ScoresTokens, HFLM):
    """A model with its tokenizer, for tasks of text."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._leads: dict[str, partial[str]] = {}  # by the rendered question; functions of the answer

    def ask(self, messages: Sequence[dict[str, Any]], render: AnswerRender) -> str:
        """Return rendered messages that ask for an answer, and remember how one would follow them."""
        prompt = question(messages, render, self.tokenizer)
        self._leads[prompt] = partial(lead, prompt, messages, render)
        return prompt

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages."""
        render = super().apply_chat_template
        return self.ask(chat_history, render) if add_generation_prompt else render(chat_history, False)

    def follow(self, requests: Sequence[Any]) -> None:
        """Put the text that the chat template writes before an answer into the prompts of requests for likelihoods.

        The requests are changed, so that lm-eval logs what is scored.
        """
        for request in requests:
            prompt, answer, *images = request.args
            request.arguments = (prompt + self._lead(prompt, answer), answer, *images)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each answer's log-likelihood in nats, and whether greedy decoding would give it."""
        self.follow(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def score(self, answers: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return what :meth:`loglikelihood` does, of the token ids of prompts and answers.

        Prompts that are too long lose their beginning.

        Raises:
            EmlocError: an answer is longer than what the model reads.
        """
        if (longest := max((len(ids) for _, ids in answers), default=0)) > self.max_length:
            raise EmlocError(
                f"An answer has {longest} tokens, but the model reads only {self.max_length}.",
                "Shorten it, or leave the row out.",
            )
        hashable = [(tuple(prompt), ids) for prompt, ids in answers]
        return likelihoods(hashable, self.batch_size, self._predict, size=lambda answer: sum(map(len, answer)))

    def _predict(self, answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[torch.Tensor]:
        """Return the logits of answers' token ids that follow those of prompts: (tokens, vocabulary) of each."""
        rows = [torch.tensor([*prompt, *ids][-self.max_length - 1 : -1]) for prompt, ids in answers]
        inputs = pad_sequence(rows, batch_first=True).to(self.device)  # nothing that counts comes after the padding
        ends, sizes = [len(row) for row in rows], [len(ids) for _, ids in answers]
        return logits_before(self.model, {"input_ids": inputs}, ends, sizes)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes, without the text that the chat template writes before any answer.

        A stop sequence within that text would end every answer at once, so it is applied afterwards.
        """
        leads = [as_written(self._lead(request.args[0]), self.tokenizer) for request in requests]
        afterwards: list[list[str]] = []
        for request, start in zip(requests, leads, strict=True):
            prompt, settings, *images = request.args
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else until
            afterwards.append([stop for stop in stops if stop in start])
            request.arguments = (prompt, {**settings, "until": [stop for stop in stops if stop not in start]}, *images)
        written = super().generate_until(requests, disable_tqdm)
        outputs = zip(written, leads, afterwards, strict=True)
        return [_before(stops, text.removeprefix(start)) for text, start, stops in outputs]

    def _lead(self, prompt: str, *answer: str) -> str:
        return self._leads[prompt](*answer) if prompt in self._leads else ""


def _before(stops: Sequence[str], text: str) -> str:
    """Return the text before the first of the stop sequences."""
    return re.split("|".join(map(re.escape, stops)), text, maxsplit=1)[0] if stops else text
