"""lm-eval: the reading of task files, a sandbox for their templates, a model's processor, how answers are scored."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from emloc_core.compat.private import patched, private


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a task file, its includes merged and its functions imported.

    No public function does this and leaves the content to be changed before the task is made of it.
    """
    with private("lm-eval"):
        from lm_eval.tasks import _yaml_loader
    return _yaml_loader.load_yaml(path)


def sandbox_templates() -> None:
    """Have the templates of task files rendered in Jinja's sandbox: lm-eval's own environment runs any Python."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    with private("lm-eval"):
        plain = utils.env
    if not isinstance(plain, SandboxedEnvironment):
        utils.env = SandboxedEnvironment(
            loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
        )
        utils.env.filters.update(plain.filters)


def without_environment() -> AbstractContextManager[None]:
    """Have lm-eval add no lists of packages and hardware to its results: it starts pip, git and others for them."""
    return patched("lm-eval", "lm_eval.evaluator", add_env_info=lambda _: None, get_git_commit_hash=lambda: None)


def answer_tokens(lm: Any, prompt: str, answer: str) -> list[int]:
    """Return the tokens of an answer as lm-eval scores them: whitespace at the prompt's end belongs to them."""
    with private("lm-eval"):
        encode = lm._encode_pair
    return encode(prompt, answer)[1]


class ScoresTokens(ABC):
    """For subclasses of ``HFLM``: likelihoods are computed by ``score``, from token ids of prompts and answers.

    lm-eval's own computes the logits of whole rows.
    """

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self.score([(prompt, answer) for _, prompt, answer in requests])

    @abstractmethod
    def score(self, answers: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return each answer's log-likelihood in nats, and whether greedy decoding would give it."""


class GivenProcessor:
    """For subclasses of ``HFMultimodalLM``: keeps the processor that it is given, which lm-eval 0.4.13 drops."""

    processor: Any
    tokenizer: Any

    def _create_tokenizer(self, _pretrained: Any, tokenizer: Any, **_: Any) -> None:
        self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer


def ask(task: Any, question: Callable[..., str]) -> None:
    """Have a task's questions made by a function of the row, instead of its templates and few-shot examples."""
    task.fewshot_context = question
