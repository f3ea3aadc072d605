"""lm-eval's model for text, whose answers begin where they do in tuning.

Some chat templates write more before an answer than they ask for one with, such as an empty block of thoughts. Tuned
models write it themselves. So answers are scored after it, and it is no part of what is generated. Others ask for an
answer with more than they write before one, such as the start of thoughts: models are asked without it.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from lm_eval.models.huggingface import HFLM

from emloc_core.data.chat_template import AnswerRender, as_written, lead, question


class TextLM(HFLM):
    """A model with its tokenizer, for tasks of text.

    Args:
        settings: arguments of ``lm_eval.models.huggingface.HFLM``.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._leads: dict[str, partial[str]] = {}  # by the rendered question; functions of the answer

    def ask(self, messages: Sequence[dict[str, Any]], render: AnswerRender) -> str:
        """Return rendered messages that ask for an answer, and remember how one would follow them."""
        asked = question(messages, render, self.tokenizer)
        self._leads[asked] = partial(lead, asked, messages, render)
        return asked

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages."""
        render = super().apply_chat_template
        return self.ask(chat_history, render) if add_generation_prompt else render(chat_history, False)

    def follow(self, requests: Sequence[Any]) -> None:
        """Let the answers of requests for likelihoods follow what the chat template writes before them.

        The requests are changed, so that lm-eval logs what is scored.
        """
        for request in requests:
            prompt, answer, *images = request.args
            request.arguments = (prompt + self._lead(prompt, answer), answer, *images)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each answer's log-likelihood in nats, and whether greedy decoding would give it."""
        self.follow(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes, without what the chat template writes before any answer.

        A stop sequence that occurs in that would end every answer at once, so it ends them afterwards.
        """
        leads = [as_written(self._lead(request.args[0]), self.tokenizer) for request in requests]
        afterwards: list[list[str]] = []
        for request, start in zip(requests, leads, strict=True):
            prompt, settings, *images = request.args
            given = settings.get("until") or []
            stops = [given] if isinstance(given, str) else given
            afterwards.append([stop for stop in stops if stop in start])
            request.arguments = (prompt, {**settings, "until": [each for each in stops if each not in start]}, *images)
        written = super().generate_until(requests, disable_tqdm)
        found = zip(written, leads, afterwards, strict=True)
        return [_before(stops, text.removeprefix(start)) for text, start, stops in found]

    def _lead(self, prompt: str, *answer: str) -> str:
        return self._leads[prompt](*answer) if prompt in self._leads else ""


def _before(stops: Sequence[str], text: str) -> str:
    """Return the text before the first of the stop sequences."""
    return re.split("|".join(map(re.escape, stops)), text, maxsplit=1)[0] if stops else text
