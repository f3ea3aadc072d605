"""The card of a tuned model's directory: what was done, the adapter and how to load it, and what else is there."""

from pathlib import Path

from emloc_core.files.card import CARD

#: What may be beside the stages' directories, besides the final one.
_HERE = {
    "recipe.toml": "what was decided, to edit and run again: `emloc run recipe.toml`",
    "report.html": "memory, losses and versions, on one page",
    "answers.json": "answers to held-out rows, before and after",
    "held_out.jsonl": "these rows, which were never tuned on",
    "skipped_rows.jsonl": "rows that could not be used, and why",
}


def write_overview(run: Path, final: str) -> None:
    """Write the card of the final output as that of the whole directory.

    Args:
        final: name of the final output's directory in it, which has a card.
    """
    text = (run / final / CARD).read_text(encoding="utf-8").replace("DIRECTORY", final)
    listed = {final: "the result", **{name: what for name, what in _HERE.items() if (run / name).is_file()}}
    lines = "".join(f"- `{name}`: {what}\n" for name, what in listed.items())
    (run / CARD).write_text(f"{text}\n## In this directory\n\n{lines}", encoding="utf-8")
