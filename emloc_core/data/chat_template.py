"""A conversation in the model's own chat template: its token ids, and which of them count in the loss.

Few templates mark what the assistant says (``{% generation %}``), which TRL's ``assistant_only_loss`` needs. Where one
does, its marks are used. Otherwise an answer starts where the template, asked for an answer to the messages before it,
ends; and ends where the conversation up to it ends or, if the template renders a last answer in another way than an
earlier one, with the end-of-sequence token.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from emloc_core.data.messages import ROLES, Message, in_parts
from emloc_core.data.row import Row
from emloc_core.data.starts import common_prefix, tokenized_with_starts
from emloc_core.errors import EmlocError
from emloc_core.files.templates import rendering

#: Token ids, and for each whether it counts in the loss: 0 or 1.
Encoded = tuple[list[int], list[int]]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: Renders messages, as text or as token ids.
_Render = Callable[..., Any]
#: Renders messages as text: True ends with the prompt for an answer, False with the content of the last message.
AnswerRender = Callable[[list[Message], bool], str]


def encode_conversations(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Encode conversations as :func:`encode_conversation` does, together where only their last answers count.

    Raises:
        EmlocError: as :func:`encode_conversation`; the message names the row.
    """
    if tokenizer.chat_template and not any(row.loss == "all" or _has_tools(row) for row in rows):
        try:
            return _last_answers(rows, tokenizer)
        except (TemplateError, ValueError, TypeError, EmlocError):
            pass  # raised again below, with the row's name
    return [encode_conversation(row, tokenizer) for row in rows]


def _last_answers(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    prompts: Any = {id(row.prompt): row.prompt for row in rows}  # two answers may share one
    conversations: Any = [[*(row.prompt or []), *(row.completion or [])] for row in rows]
    with rendering():
        rendered: Any = tokenizer.apply_chat_template([*prompts.values()], tokenize=False, add_generation_prompt=True)
        texts: Any = tokenizer.apply_chat_template(conversations, tokenize=False)
    prompt_texts = dict(zip(prompts, rendered, strict=True))
    encoded = tokenized_with_starts([prompt_texts[id(row.prompt)] for row in rows], texts, tokenizer)
    return [from_start(ids, start) for ids, start in encoded]


def _has_tools(row: Row) -> bool:
    messages: Any = [*(row.prompt or []), *(row.completion or [])]
    return bool(row.tools) or any(message["role"] == "tool" or "tool_calls" in message for message in messages)


def from_start(ids: list[int], start: int) -> Encoded:
    """Return ids with their mask: they count in the loss from ``start`` on."""
    return ids, [0] * start + [1] * (len(ids) - start)


def encode_conversation(row: Row, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Return the ids of a conversation, and for each whether it counts in the loss: 0 or 1.

    Args:
        row: a conversation; its ``loss`` says which answers count.

    Raises:
        EmlocError: there is no chat template, it rejects the conversation, it leaves out tools or calls, or it does not
            show where answers start and end.
    """
    assert isinstance(row.prompt, list)
    assert isinstance(row.completion, list)
    require_template(row, tokenizer)

    tools: Any = row.tools

    def render(messages: list[Message], *, text: bool = False, tools: Any = tools, **settings: Any) -> Any:
        form: dict[str, Any] = {"tokenize": False} if text else {"tokenize": True, "return_dict": True}
        encoded: Any = tokenizer.apply_chat_template(messages, tools=tools, **form, **settings)
        return encoded if text else encoded["input_ids"]

    messages = [*row.prompt, *row.completion]
    try:
        ids = render(messages)
        _require_tools_shown(row, messages, ids, render)
        if row.loss == "last":
            start = common_prefix(render(row.prompt, add_generation_prompt=True), ids)
            return from_start(ids, start)
        if _MARKS.search(tokenizer.get_chat_template(tools=tools)):
            marked: Any = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return ids, list(marked["assistant_masks"])
        return ids, _all_answers(row, messages, ids, render, tokenizer.eos_token_id)
    except (TemplateError, ValueError, TypeError) as error:
        raise EmlocError(
            f"{row.name}: the model's chat template rejects it ({error}).",
            f"{ROLES} Correct them and their order, or leave the row out.",
        ) from error


def answer_render(processing: Any, tools: Any = None) -> AnswerRender:
    """Return a function that renders messages with the template of a tokenizer or a processor."""

    def render(messages: list[Message], for_answer: bool) -> str:
        rendered: Any = processing.apply_chat_template(
            in_parts(messages) if isinstance(processing, ProcessorMixin) else messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=for_answer,
            continue_final_message=not for_answer,
        )
        return rendered

    return render


def question(messages: Sequence[Message], render: AnswerRender, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return messages, rendered with that part of the prompt for an answer which conversations in tuning have too.

    Some templates end the prompt with the start of thoughts, and leave that out before an answer without thoughts.
    """
    prompt = render([*map(dict, messages)], True)
    try:
        history = render([*map(dict, messages)], False)
        answered = render([*map(dict, messages), {"role": "assistant", "content": "?"}], False)
    except (TemplateError, ValueError, TypeError):
        return prompt
    if not tokenizer.is_fast:  # a slow one knows no positions of tokens in a text
        return prompt
    encoded = tokenizer([prompt, answered], add_special_tokens=False)
    both: Any = encoded["input_ids"]
    last = encoded.token_to_chars(0, max(0, common_prefix(*both) - 1))
    common = prompt[: last.end] if last else ""
    return common if common.startswith(history) else prompt  # some templates then render the messages differently


def untuned_start(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return how the prompt for an answer begins it, which tuning does not show: ``<think>``, say, or nothing."""
    messages: list[Message] = [{"role": "user", "content": "?"}]
    render = answer_render(tokenizer)
    try:
        return render(messages, True).removeprefix(question(messages, render, tokenizer))
    except (TemplateError, ValueError, TypeError):  # there is no template, or it takes no such question
        return ""


def lead(prompt: str, messages: Sequence[Message], render: AnswerRender, answer: str = "?") -> str:
    """Return what the template writes between the prompt for an answer and the answer: an empty block of thoughts, say.

    Args:
        prompt: the messages, rendered with the prompt for an answer; see :func:`question`.
        answer: the answer that follows; any text while it is not known yet.

    Returns:
        "" also where the rendered text does not begin with ``prompt``, or does not end with ``answer``.
    """
    try:
        answered = render([*map(dict, messages), {"role": "assistant", "content": answer}], False)
    except (TemplateError, ValueError, TypeError):
        return ""
    continuation = answered.removeprefix(prompt)
    return continuation[: -len(answer)] if continuation != answered and answer and continuation.endswith(answer) else ""


def as_written(text: str, tokenizer: Any) -> str:
    """Return a text as it is decoded when a model writes it: without special tokens."""
    decoded: str = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=True)
    return decoded


def _all_answers(row: Row, messages: list[Message], ids: list[int], render: _Render, end_token: Any) -> list[int]:
    """Return the mask of all answers. An assistant's message that opens the conversation does not count."""
    mask, text = [0] * len(ids), render(messages, text=True)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        before, up_to = messages[:index], messages[: index + 1]
        start = common_prefix(render(before, add_generation_prompt=True), ids)
        partial_ids = render(up_to)
        if not text.startswith(render(before, text=True, add_generation_prompt=True)):
            end = None
        elif len(up_to) == len(messages):
            end = len(ids)
        elif text.startswith(render(up_to, text=True)):
            end = common_prefix(partial_ids, ids)
        else:
            next_one = start + common_prefix(render(_rewritten(messages, index + 1))[start:], ids[start:])
            closed = end_token in partial_ids[start:] and end_token in ids[start:next_one]
            end = ids.index(end_token, start) + 1 if closed else None
        if end is None:
            raise EmlocError(
                f"{row.name}: the model's chat template renders message {index + 1} differently depending on what "
                "follows, so its part of the loss cannot be found.",
                "Mark answers by {% generation %} in the template, use --loss last, or leave the row out.",
                code="unsupported",
            )
        mask[start:end] = [1] * (end - start)
    return mask


def _rewritten(messages: list[Message], index: int) -> list[Message]:
    """Return the messages; those from ``index`` on with a content that differs from its first character."""
    others = [message | {"content": "?" if message["content"][:1] != "?" else "!"} for message in messages[index:]]
    return [*messages[:index], *others]


def _require_tools_shown(row: Row, messages: list[Message], ids: list[int], render: _Render) -> None:
    """Refuse a template that leaves out tools, their calls or their answers: training would be on another text."""
    calls = [{name: part for name, part in message.items() if name != "tool_calls"} for message in messages]
    answers = [message | {"content": ""} if message["role"] == "tool" else message for message in messages]
    missing = None
    if row.tools and render(messages, tools=None) == ids:
        missing = "tools"
    elif calls != messages and render(calls) == ids:
        missing = "tool calls"
    elif answers != messages and render(answers) == ids:
        missing = "the answers of tools"
    if missing:
        raise EmlocError(
            f"{row.name}: the model's chat template leaves out {missing}.",
            "Use a model whose template shows them, or leave the row out.",
            code="unsupported",
        )


def require_template(row: Row, processing: Any) -> None:
    """Refuse a conversation if there is no chat template."""
    if not processing.chat_template:
        kind = "tokenizer" if isinstance(processing, PreTrainedTokenizerBase) else "processor"
        raise EmlocError(
            f"{row.name} is a conversation, but the model's {kind} has no chat template.",
            "Use a model tuned for chat, add a chat_template, or give prompt and completion as strings.",
        )
