"""A conversation with a model: text and images in, an answer that is streamed as it is written."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import click
import torch
from jinja2 import TemplateError
from transformers import ProcessorMixin, TextStreamer, set_seed

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.belonging import is_for_another
from emloc_core.data.chat_template import answer_render, as_written, lead, question
from emloc_core.data.images import Picture
from emloc_core.data.limits import Limits
from emloc_core.data.messages import IMAGE, Message
from emloc_core.errors import EmlocError
from emloc_core.evaluation.loading import load_system
from emloc_core.files.checkpoint import open_checkpoint


class Conversation:
    """A conversation that remembers its turns.

    Args:
        model: a transformers or PEFT model.
        processing: its tokenizer, or its processor if there may be images.
        temperature: 0 always takes the likeliest token; None leaves it to the model's own generation config.
        seed: seed of an answer's sampling; None draws another answer each time.

    A model without a chat template continues each message as plain text, and remembers nothing.
    """

    def __init__(
        self,
        model: Any,
        processing: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> None:
        self.model, self.processing = model, processing
        self.has_template = bool(processing.chat_template)
        if system is not None and not self.has_template:
            raise EmlocError("The model has no chat template, so it takes no system message.", "Leave it out.")
        self.reads_images = isinstance(processing, ProcessorMixin)
        self._tokenizer = processing.tokenizer if self.reads_images else processing
        self._start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._most, self._seed = max_new_tokens, seed
        self._sampling: dict[str, Any] = {}
        if temperature is not None:
            self._sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        self.reset()

    def reset(self) -> None:
        """Forget all turns but the system message."""
        self.messages, self._pictures = list(self._start), list[Picture]()

    def say(
        self, text: str, images: Sequence[str | PathLike[str]] = (), write: Callable[[str], None] = lambda _: None
    ) -> str:
        """Say something and return the answer, without surrounding space and the chat template's text before it.

        Args:
            images: paths of images, which are put before the text.
            write: is called with each piece of the answer as soon as it is known.

        Raises:
            EmlocError: an image cannot be read, the model reads no images, its chat template rejects the conversation,
                or there is no room for it. The message is then forgotten.
        """
        if images and not self.reads_images:
            raise EmlocError(
                "The model reads no images.", "Leave out the images, or use an image-text model.", code="mismatch"
            )
        pictures = [Picture.from_source(fspath(image), Path()) for image in images]
        content = [*(dict(IMAGE) for _ in pictures), {"type": "text", "text": text}] if pictures else text
        messages = [*self.messages, {"role": "user", "content": content}]
        all_pictures = [*self._pictures, *pictures]
        inputs = self._inputs(messages, all_pictures) if self.has_template else (self._plain(text), "")
        answer = self._answer(*inputs, write)
        if self.has_template:
            self.messages, self._pictures = [*messages, {"role": "assistant", "content": answer}], all_pictures
        return answer

    def complete(
        self,
        messages: Sequence[Message],
        pictures: Sequence[Picture] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the answer to messages, as :meth:`say` does; neither is remembered.

        Args:
            tools: the tools that may be called, as functions in JSON schema.

        Raises:
            EmlocError: see :meth:`say`.
        """
        return self._answer(*self._inputs(list(messages), list(pictures), tools), lambda _: None)

    def continue_text(self, text: str) -> str:
        """Return how the model continues a text, without a chat template.

        Raises:
            EmlocError: there is no room for more.
        """
        return self._answer(self._plain(text), "", lambda _: None)

    def _plain(self, text: str, **settings: Any) -> Any:
        return self._tokenizer(text, return_token_type_ids=False, return_tensors="pt", **settings)

    def _inputs(self, messages: list[Message], pictures: list[Picture], tools: Any = None) -> tuple[Any, str]:
        """Return the model's inputs, and the text that the chat template writes before an answer."""
        render = answer_render(self.processing, tools)
        try:
            text = question(messages, render, self._tokenizer)
            start = as_written(lead(text, messages, render), self._tokenizer)
            # The template writes the special tokens itself.
            if not self.reads_images:
                return self._plain(text, add_special_tokens=False), start
            images = [picture.read() for picture in pictures] or None
            return self.processing(text=[text], images=images, add_special_tokens=False, return_tensors="pt"), start
        except (TemplateError, ValueError) as error:
            raise EmlocError(
                f"The model's chat template rejects the conversation ({error}).", "Leave out the system message."
            ) from error

    def _answer(self, inputs: Any, start: str, write: Callable[[str], None]) -> str:
        length = inputs["input_ids"].shape[1]
        longest = Limits.for_config(self.model.config).tokens
        room = self._most if longest is None else min(self._most, longest - length)
        if room < 1:
            raise EmlocError(
                f"The conversation has {length} tokens, but the model takes at most {longest}.", "Start a new one."
            )
        if self._seed is not None:
            set_seed(self._seed)
        inputs = inputs.to(self.model.device)
        streamer = _Streamer(self._tokenizer, start, write)
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._tokenizer.eos_token_id
        with torch.inference_mode():
            self.model.generate(
                **inputs, max_new_tokens=room, streamer=streamer, pad_token_id=pad, **self._sampling
            )  # fmt: skip
        return "".join(streamer.pieces).strip()


class _Streamer(TextStreamer):
    """Passes on the pieces of an answer, but not what the chat template writes before any answer."""

    def __init__(self, tokenizer: Any, start: str, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._start, self._pending, self._write = start, "", write
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._pending += text
        if self._start.startswith(self._pending) and not stream_end:
            return  # it may become the whole start
        text, self._start, self._pending = self._pending.removeprefix(self._start), "", ""
        if text:
            self.pieces.append(text)
            self._write(text)


def open_conversation(model: str, adapter: Path | None = None, **settings: Any) -> Conversation:
    """Load a model, and an adapter if there is one, for a conversation; on the GPU if there is one.

    Args:
        model: directory or hub id of a model or an emulator, or directory of an adapter, which names its model.
        adapter: directory of a PEFT adapter for the model.
        settings: see :class:`Conversation`.

    Raises:
        EmlocError: the model, its tokenizer or the adapter cannot be loaded, or they do not fit each other.
    """
    if adapter is None and (Path(model) / "adapter_config.json").is_file():
        adapter, model = Path(model), Adapter(model).model_name
    checkpoint = open_checkpoint(model)
    if adapter is not None and is_for_another(lora := Adapter(adapter), checkpoint):
        click.echo(f"warning: {adapter} was made for {lora.base_name}, which is not {model}.", err=True)
    return Conversation(*load_system(checkpoint.directory, adapter, images=None), **settings)
