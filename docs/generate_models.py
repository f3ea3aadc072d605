"""Writes models.md: the memory of every model of the registry, and what fits common GPUs (`make docs-models`).

Every entry is planned as `emloc plan` does it, which takes a while; so it is not part of `make docs`. With `--new`,
only entries that the page lacks are planned.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from emloc_core.cli.console import progress
from emloc_core.memory.budget import Budget
from emloc_core.memory.cards import CARDS, Card
from emloc_core.memory.decision import Decision, decide
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.streamed import compress
from emloc_core.memory.ways import EXACT, ORDINARY
from emloc_core.memory.workload import make_workload
from emloc_core.plugins.manager import TOKENS, plugin_manager
from emloc_core.registry.entry import Entry
from emloc_core.registry.registry import load_entries
from emloc_core.settings import CompressSettings
from emloc_core.units import human_seconds

PAGE = Path(__file__).parent / "models.md"
#: Memory of cards without a name, in 10^9 bytes.
SMALL = (12,)
#: Named cards, for which step times are computed.
NAMED = [CARDS[name] for name in ("RTX 4080", "RTX 4090", "L40S", "A100")]
#: Tokens per row of the workload, which is one row.
LENGTH = 1024


def heading(card: Card) -> str:
    """Return the heading of a card."""
    return f"{card.memory // 10**9} GB ({card.name})"


INTRODUCTION = f"""# Models

`make docs-models` writes this page. `emloc plan ID` plans any of these models for another workload, without a network:
`emloc plan Qwen/Qwen2.5-7B --memory 24GB --batch-size 4`.

The workload is one row of {LENGTH:,} tokens, in image-text models including one image of 448 x 448 pixels; a LoRA of
rank 8 where the entry's preset `default` puts it; gradient checkpointing, bf16 autocast. 5 % of a card's memory stay
free, at most 1 GiB. Memory is in GB, 10^9 bytes. All figures are [predictions](memory.md); none was measured on a GPU.

| column | meaning |
|---|---|
| inference | reading a prompt of that length and writing the first token; the tuned model needs it too |
| LoRA | tuning a LoRA on the model itself |
| EMLoC | tuning it on an emulator with weights in four bits, `nf4` |
| compress | making that emulator, block by block |
| 12 GB to 80 GB | what `plan` decides: the kind and its ratio; `whole`: an ordinary LoRA; `exact` steps; `-`: none |

Times are lower bounds for an optimiser step, **computed** from the card's published figures, as by
`emloc plan ID --card "RTX 4090"`.
"""
#: Kinds whose weights are listed for mixtures of experts.
WHOLE, KINDS = "bf16", ("nf4", "trellis")
EXPERTS = """## Mixtures of experts

The weights in GB, of the model in bfloat16 and of its emulators, whose experts and vocabulary are packed too.
"""
HEADINGS = ["model", "inference", "LoRA", "EMLoC", "compress", *(f"{size} GB" for size in SMALL), *map(heading, NAMED)]


def figures(entry: Entry) -> dict[str, str]:
    """Return what a model needs, by column."""
    train = entry.preset().train
    with entry.config_file() as file:
        workload = make_workload(file, train.model_copy(update={"batch_size": 1}), "cuda", length=LENGTH)
        model = MemoryModel(file, workload, CompressSettings(kind=workload.recommended_kinds[0]))
        plan = model.plan()
        needs = {
            "inference": gigabytes(model.inference().total),
            "LoRA": gigabytes(model.tuning().total),
            "EMLoC": gigabytes(model.tuning(plan).total),
            "compress": gigabytes(compress(model, plan).total),
            **weights(model),
        }
        for size in SMALL:
            needs[f"{size} GB"] = cell(decide(file, workload, Budget.parse(f"{size}GB")))
        for card in NAMED:
            needs[heading(card)] = cell(decide(file, workload, Budget.parse(str(card.memory)), speed=card.speed))
    return needs


def weights(model: MemoryModel) -> dict[str, str]:
    """Return the bytes of a mixture of experts, and of its emulators, by column; nothing for another model."""
    if not model.linears.experts:
        return {}
    kinds = {kind: MemoryModel(model.config_file, model.workload, CompressSettings(kind=kind)) for kind in KINDS}
    emulators = {f"`{kind}`": emulator.emulator_bytes(emulator.plan()) for kind, emulator in kinds.items()}
    sizes = {WHOLE: model.parameters() * model.dtype.itemsize, **emulators}
    return {column: gigabytes(nbytes) for column, nbytes in sizes.items()}


def gigabytes(nbytes: int) -> str:
    """Return bytes in GB, to three digits."""
    return f"{float(f'{nbytes / 1e9:.3g}'):,g}"


def cell(decision: Decision) -> str:
    """Return a decision in a word or two, with the time of a step where the card has a name."""
    way = decision.way
    if way is None:
        return "-"
    time = "" if way.seconds is None else f", {human_seconds(way.seconds)}"
    if way.kind is None:
        return {ORDINARY: "whole", EXACT: "exact"}[way.name] + time
    return (way.kind if way.ratio is None else f"{way.kind} {way.ratio:g}") + time


def page(entries: list[Entry], figures_by_entry: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page: a table of the models, and the fingerprints of their entries.

    Args:
        entries: the models.
        found: their figures, by fingerprint.
    """
    parts = [INTRODUCTION]
    rows = [["`" + entry.id + "`", *(figures_by_entry[entry.fingerprint][column] for column in HEADINGS[1:])]
            for entry in sorted(entries, key=lambda entry: entry.family)]  # fmt: skip
    parts.append(table(HEADINGS, rows))
    columns = [WHOLE, *(f"`{kind}`" for kind in KINDS)]
    mixtures = [["`" + entry.id + "`", *(figures_by_entry[entry.fingerprint][column] for column in columns)]
                for entry in sorted(entries, key=lambda entry: entry.family)
                if WHOLE in figures_by_entry[entry.fingerprint]]  # fmt: skip
    parts += [EXPERTS, table(["model", *columns], mixtures)]
    parts.append("An entry's file in `registry/` says where its numbers were published, and under which licence.\n")
    parts.append("".join(map(mark, entries)) + "\n")
    return "\n".join(parts)


def listed_entries() -> list[Entry]:
    """Return the entries of the page: models of tokens. Those of pictures are planned in ``pictures.md``."""
    others = {family.name for family in plugin_manager().families() if family.objective != TOKENS}
    return [entry for entry in load_entries() if entry.family not in others]


def figures_on_page() -> dict[str, dict[str, str]]:
    """Return the figures on the page, by column, of the entries that have not changed since, by fingerprint."""
    text = PAGE.read_text(encoding="utf-8")
    by_id: dict[str, dict[str, str]] = defaultdict(dict)
    headings: list[str] = []
    for line in text.splitlines():
        first, *cells = line.strip("| ").split(" | ")
        if first == HEADINGS[0]:
            headings = cells
        elif line.startswith("| `"):
            by_id[first.strip("`")] |= dict(zip(headings, cells, strict=True))
    return {entry.fingerprint: by_id[entry.id] for entry in listed_entries() if mark(entry) in text}


def mark(entry: Entry) -> str:
    """Return a comment that shows that the page is about this version of an entry."""
    return f"<!--{entry.id}:{entry.fingerprint[:16]}-->"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    first, *others = (f"| {' | '.join(line)} |" for line in [headings, *rows])
    return "\n".join([first, f"|{'---|' * len(headings)}", *others]) + "\n"


def main(*options: str) -> None:
    """Plan all entries or new ones, architectures that are the same once, and write the page."""
    entries = listed_entries()
    figures_by_entry = figures_on_page() if "--new" in options else {}
    alike = defaultdict(list)
    for entry in entries:
        if entry.fingerprint not in figures_by_entry:
            alike[json.dumps([entry.config, entry.preset().model_dump()], sort_keys=True)].append(entry)
    with ProcessPoolExecutor(os.cpu_count()) as pool, progress("models") as report:
        planned = pool.map(figures, [first for first, *_ in alike.values()])
        for count, (group, needs) in enumerate(zip(alike.values(), planned, strict=True), 1):
            figures_by_entry |= dict.fromkeys((entry.fingerprint for entry in group), needs)
            report(group[0].id, count, len(alike))
    PAGE.write_text(page(entries, figures_by_entry), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
