"""lm-eval's model for images and text, extended to score answers to prompts with images.

lm-eval 0.4.13 generates from images, but raises NotImplementedError for likelihoods.
The model's inputs are those of TRL's collator in tuning: prompt and images go through the processor, answers
separately through the tokenizer, both without further special tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval.models.hf_vlms import HFMultimodalLM
from torch.nn import functional

from emloc_core.compat.lm_eval import GivenProcessor
from emloc_core.errors import EmlocError
from emloc_core.evaluation.images import PLACEHOLDER
from emloc_core.evaluation.likelihood import Answer, likelihoods, logits_before
from emloc_core.evaluation.text_lm import TextLM


class ImageTextLM(TextLM, GivenProcessor, HFMultimodalLM):
    """An image-text model with its processor, for tasks with ``doc_to_image``.

    Args:
        tokenizer: the model's processor (lm-eval's name for the argument).
    """

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages, with each ``<image>`` replaced by the model's own mark.

        Raises:
            EmlocError: the template refuses the messages.
        """
        try:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        except TemplateError as error:
            raise EmlocError(
                f"The model's chat template refuses a prompt ({error}).",
                "If it takes no system message, leave `description` out of the task file.",
            ) from error

    def answer_ids(self, answer: str) -> list[int]:
        """Return an answer's token ids, as they follow a prompt."""
        return self.tokenizer.encode(answer, add_special_tokens=False)

    def tok_batch_multimodal_encode(
        self,
        strings: Sequence[str],
        images: Sequence[Iterable[Any]],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> Any:
        """Return the processor's inputs for B prompts: ``input_ids`` and ``attention_mask``, (B, T), and the pixels.

        lm-eval's own would add a second beginning-of-sequence token to a chat, and cut images out of long prompts.

        Raises:
            EmlocError: a prompt has more than ``left_truncate_len`` tokens, or the processor refuses it.
        """
        if not self.chat_applied:  # a chat template inserts its own marks
            strings = [string.replace(PLACEHOLDER, self.image_token) for string in strings]
        decoded = [list(pictures) for pictures in images]
        try:
            encoded = self.processor(
                text=list(strings),
                images=decoded if any(decoded) else None,
                padding=True,
                padding_side=padding_side,
                add_special_tokens=False,
                return_tensors="pt",
            )
        except (ValueError, IndexError, StopIteration) as error:
            raise EmlocError(
                f"The model's processor refuses a prompt with images ({error}): {strings[0][:60]!r}.",
                "Write no special tokens of the model into the text.",
            ) from error
        length = encoded["input_ids"].shape[1]
        if left_truncate_len is not None and length > left_truncate_len:
            raise EmlocError(
                f"A prompt with its images has {length} tokens, but there is room for only {left_truncate_len}.",
                "Use smaller or fewer images, or leave the row out; for a task of generation, lower max_gen_toks.",
            )
        return encoded.to(self.device, self.model.dtype)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002
        """Return each answer's log-likelihood in nats, and whether greedy decoding would give it.

        Args:
            requests: lm-eval's instances with the arguments prompt, answer, and ``{"visual": images}``.
        """
        self.follow(requests)
        prompts = [(request.task_name, request.doc_id, request.args[0]) for request in requests]
        arguments = dict(zip(prompts, (request.args for request in requests), strict=True))
        ids = [self.answer_ids(request.args[1]) for request in requests]

        def predict(batch: Sequence[Answer]) -> list[torch.Tensor]:
            return self._predict_after_images([(arguments[prompt], answer) for prompt, answer in batch])

        answers = list(zip(prompts, ids, strict=True))
        return likelihoods(answers, self.batch_size, predict, size=lambda answer: len(answer[0][-1]))

    def _predict_after_images(self, batch: Sequence[tuple[Any, list[int]]]) -> list[torch.Tensor]:
        """Return the logits of answers' token ids: (tokens, vocabulary) of each."""
        longest = max(len(ids) for _, ids in batch) - 1  # the last token need not be read
        inputs = self.tok_batch_multimodal_encode(
            [args[0] for args, _ in batch],
            [args[2]["visual"] for args, _ in batch],
            padding_side="right",  # positions are counted from the left
            left_truncate_len=self.max_length - longest,
        )
        ends = inputs["attention_mask"].sum(1).tolist()
        shape = inputs["input_ids"].shape
        for name, value in inputs.items():  # token ids, masks and types, but not pixels
            if value.shape == shape:
                filler = self.tokenizer.pad_token_id if name == "input_ids" else 0
                inputs[name] = functional.pad(value, (0, longest), value=filler)
        for row, (end, (_, ids)) in enumerate(zip(ends, batch, strict=True)):
            inputs["input_ids"][row, end : end + len(ids) - 1] = torch.tensor(ids[:-1], dtype=torch.int64)
            inputs["attention_mask"][row, end : end + len(ids) - 1] = 1
        sizes = [len(ids) for _, ids in batch]
        return logits_before(self.model, inputs, [end + size - 1 for end, size in zip(ends, sizes, strict=True)], sizes)
