"""Rows that are conversations of several turns, or with tools, shown to the model as in tuning.

lm-eval asks one question per row. In a task file whose ``doc_to_text`` names a column of messages, the question is all
of the conversation before the last answer, in the model's own chat template.
"""

from itertools import count
from typing import Any

from emloc_core.compat.lm_eval import ask
from emloc_core.data.chat_template import encode_conversation
from emloc_core.data.row import parse_row
from emloc_core.errors import EmlocError


def asks_conversations(task: Any) -> bool:
    """Return whether ``doc_to_text`` of an lm-eval task names a column of messages."""
    column, row = task.config.doc_to_text, task.eval_docs[0]
    return isinstance(column, str) and isinstance(row, dict) and isinstance(row.get(column), list)


def ask_conversations(task: Any, tokenizer: Any) -> None:
    """Make an lm-eval task ask conversations.

    When its requests are built, it raises an EmlocError if a row is no conversation, or the chat template rejects it.

    Args:
        task: see :func:`asks_conversations`.
        tokenizer: of the model, with a chat template.
    """
    numbers = count(1)

    def context(doc: Any, **_: Any) -> str:
        number = next(numbers)
        row = parse_row(doc, f"The task {task.task_name}, row {number}", number)
        encode_conversation(row, tokenizer)  # refuses what the template rejects or leaves out
        question: Any = [*(row.prompt or []), *(row.completion or [])][:-1]
        text: str = tokenizer.apply_chat_template(question, tools=row.tools, tokenize=False, add_generation_prompt=True)
        return text

    if task.config.num_fewshot:
        raise EmlocError(f"The task {task.task_name} asks conversations of several turns.", "Leave out num_fewshot.")
    ask(task, context)
