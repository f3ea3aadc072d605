"""``emloc chat``."""

import signal
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.errors import EmlocError, printable

if TYPE_CHECKING:
    from emloc_core.evaluation.conversation import Conversation

_HELP = "/image PATH adds an image to the next message, /reset starts over, /exit or Ctrl-D quits."


@click.command("chat")
@click.argument("model")
@click.argument("adapter", type=click.Path(path_type=Path), required=False)
@click.option("--system", help="System message.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Image to show with the first message; repeatable.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Maximum tokens per answer."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    help="Sampling temperature; 0 always picks the most likely token.  [default: the model's own generation config]",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of each answer.  [default: a new one each time]")
def command(model: str, adapter: Path | None, images: tuple[Path, ...], **settings: Any) -> None:
    """Talk to MODEL, with ADAPTER if one is given; answers appear as they are generated.

    MODEL is a model, an emulator, or an adapter, which names its model. Ctrl-C stops an answer. Without a terminal,
    every line of stdin is a message, and stdout has only the answers.
    """
    from emloc_core.stages.precheck import check_exists

    check_exists(model)
    from transformers.utils import logging

    from emloc_core.cli.verbosity import set_up_libraries
    from emloc_core.evaluation.conversation import open_conversation

    logging.set_verbosity_error()
    set_up_libraries(on_terminal=sys.stderr.isatty())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C stops an answer: the command was not interrupted
    conversation = open_conversation(model, adapter, **settings)
    if sys.stdin.isatty():
        click.echo(_HELP, err=True)
        if not conversation.has_template:
            click.echo("The model has no chat template: it continues each message as plain text.", err=True)
    _talk(conversation, list(images))


def _talk(conversation: "Conversation", images: list[Path]) -> None:
    for line in _lines():
        name, _, argument = line.partition(" ")
        if name == "/exit":
            return
        if name == "/reset":
            conversation.reset()
        elif name == "/image":
            images.append(Path(expanduser(argument.strip())))  # which leaves an unknown ~name as it is
        elif line.strip():
            try:
                conversation.say(line, images, lambda piece: click.echo(_shown(piece), nl=False))
            except KeyboardInterrupt:  # stops this answer, which is not remembered
                click.echo(" ...", nl=False)
            except EmlocError as error:
                if not sys.stdin.isatty():
                    raise
                click.echo(f"emloc: {printable(error)}", nl=False, err=True)
            click.echo()
            images = []


def _lines() -> Iterator[str]:
    """Yield the user's lines until the input ends."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return


def _shown(text: str) -> str:
    """Return a model's text with everything escaped that a terminal would act on, except newlines and tabs."""
    return "".join(character if character in "\n\t" else printable(character) for character in text)
