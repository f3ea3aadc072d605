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

from emloc_core.data.messages import Message, in_parts
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
            pass  # found again below, with its row
    return [encode_conversation(row, tokenizer) for row in rows]


def _last_answers(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    prompts: Any = {id(row.prompt): row.prompt for row in rows}  # two answers have one
    conversations: Any = [[*(row.prompt or []), *(row.completion or [])] for row in rows]
    with rendering():
        asked: Any = tokenizer.apply_chat_template([*prompts.values()], tokenize=False, add_generation_prompt=True)
        texts: Any = tokenizer.apply_chat_template(conversations, tokenize=False)
    known = dict(zip(prompts, asked, strict=True))
    found = tokenized_with_starts([known[id(row.prompt)] for row in rows], texts, tokenizer)
    return [from_start(*each) for each in found]


def _has_tools(row: Row) -> bool:
    messages: Any = [*(row.prompt or []), *(row.completion or [])]
    return bool(row.tools) or any(message["role"] == "tool" or "tool_calls" in message for message in messages)


def from_start(ids: list[int], start: int) -> Encoded:
    """Return ids of which those from ``start`` on count in the loss."""
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

    given: Any = row.tools

    def render(messages: list[Message], *, text: bool = False, tools: Any = given, **settings: Any) -> Any:
        form: dict[str, Any] = {"tokenize": False} if text else {"tokenize": True, "return_dict": True}
        found: Any = tokenizer.apply_chat_template(messages, tools=tools, **form, **settings)
        return found if text else found["input_ids"]

    messages = [*row.prompt, *row.completion]
    try:
        ids = render(messages)
        _require_tools_shown(row, messages, ids, render)
        if row.loss == "last":
            start = common_prefix(render(row.prompt, add_generation_prompt=True), ids)
            return from_start(ids, start)
        if _MARKS.search(tokenizer.get_chat_template(tools=given)):
            marked: Any = tokenizer.apply_chat_template(
                messages, tools=given, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return ids, list(marked["assistant_masks"])
        return ids, _all_answers(row, messages, ids, render, tokenizer.eos_token_id)
    except (TemplateError, ValueError, TypeError) as error:
        raise EmlocError(
            f"{row.name}: the model's chat template rejects it ({error}).",
            "Correct the roles and their order, or leave the row out.",
        ) from error


def answer_render(processing: Any, tools: Any = None) -> AnswerRender:
    """Return what renders messages by the template of a tokenizer, or of a processor, which takes contents in parts."""

    def render(messages: list[Message], for_answer: bool) -> str:
        found: Any = processing.apply_chat_template(
            in_parts(messages) if isinstance(processing, ProcessorMixin) else messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=for_answer,
            continue_final_message=not for_answer,
        )
        return found

    return render


def question(messages: Sequence[Message], render: AnswerRender, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return messages, rendered with the prompt for an answer, as far as conversations with one have it in tuning.

    Some templates ask for an answer by the start of thoughts, and leave that out before an answer without any.
    """
    asked = render([*map(dict, messages)], True)
    try:
        said = render([*map(dict, messages)], False)
        answered = render([*map(dict, messages), {"role": "assistant", "content": "?"}], False)
    except (TemplateError, ValueError, TypeError):
        return asked
    if not tokenizer.is_fast:  # which knows no places of tokens in a text
        return asked
    encoded = tokenizer([asked, answered], add_special_tokens=False)
    both: Any = encoded["input_ids"]
    last = encoded.token_to_chars(0, max(0, common_prefix(*both) - 1))
    common = asked[: last.end] if last else ""
    return common if common.startswith(said) else asked  # some templates render the messages themselves otherwise


def untuned_start(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the prompt for an answer begins it with, and tuning does not show: ``<think>``, say, or nothing."""
    messages: list[Message] = [{"role": "user", "content": "?"}]
    render = answer_render(tokenizer)
    try:
        return render(messages, True).removeprefix(question(messages, render, tokenizer))
    except (TemplateError, ValueError, TypeError):  # there is no template, or it takes no such question
        return ""


def lead(asked: str, messages: Sequence[Message], render: AnswerRender, answer: str = "?") -> str:
    """Return what the template writes between the prompt for an answer and the answer: an empty block of thoughts, say.

    Args:
        asked: the messages, rendered with that prompt; see :func:`question`.
        answer: which is to follow; any, where it is not known yet.

    Returns:
        "" also where what the template shows does not begin with that prompt, or end with the answer as it is given.
    """
    try:
        answered = render([*map(dict, messages), {"role": "assistant", "content": answer}], False)
    except (TemplateError, ValueError, TypeError):
        return ""
    said = answered.removeprefix(asked)
    return said[: -len(answer)] if said != answered and answer and said.endswith(answer) else ""


def as_written(text: str, tokenizer: Any) -> str:
    """Return a text as it is decoded where a model writes it: without special tokens."""
    found: str = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=True)
    return found


def _all_answers(row: Row, messages: list[Message], ids: list[int], render: _Render, end_token: Any) -> list[int]:
    """Return the mask of all answers. What the assistant says first of all answers nothing, and does not count."""
    mask, text = [0] * len(ids), render(messages, text=True)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        before, up_to = messages[:index], messages[: index + 1]
        start = common_prefix(render(before, add_generation_prompt=True), ids)
        whole = render(up_to)
        if not text.startswith(render(before, text=True, add_generation_prompt=True)):
            end = None
        elif len(up_to) == len(messages):
            end = len(ids)
        elif text.startswith(render(up_to, text=True)):
            end = common_prefix(whole, ids)
        else:
            next_one = start + common_prefix(render(_rewritten(messages, index + 1))[start:], ids[start:])
            closed = end_token in whole[start:] and end_token in ids[start:next_one]
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
    """Return the messages with another content, from its start on, from ``index`` on."""
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
        what = "tokenizer" if isinstance(processing, PreTrainedTokenizerBase) else "processor"
        raise EmlocError(
            f"{row.name} is a conversation, but the model's {what} has no chat template.",
            "Use a model tuned for chat, add a chat_template, or give prompt and completion as strings.",
        )
