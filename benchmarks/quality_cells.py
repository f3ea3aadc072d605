"""The cells that ``quality.py`` measures, the most telling first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from quality_rows import TEXTS

PICTURES = "pictures"
TASKS = (*TEXTS, PICTURES)
STEPS, EXACT = 60, (10, 20)
#: Learning rates that every way may choose from, by task: the likeliest first.
LEARNING_RATES = dict.fromkeys(TEXTS, (2e-3, 1e-3, 4e-3)) | {PICTURES: (8e-3, 4e-3, 16e-3)}
MEMORIES = (0.07, 0.11, 0.17, 0.28, 0.6)
_OF_TEXT = {
    0.07: ("low-rank-2-bit", 0.07), 0.11: ("low-rank-nf4", 0.11), 0.17: ("trellis", 0.17), 0.28: ("nf4", 0.28),
    0.6: ("nf4", 0.28),
}  # fmt: skip
#: Kind of the emulator that is recommended for a memory, by task; weights in four bits take no more than 0.28.
RECOMMENDED = dict.fromkeys(TEXTS, _OF_TEXT) | {PICTURES: {**_OF_TEXT, 0.17: ("low-rank-nf4", 0.17)}}
#: Kinds that there are. Rows of those that gained nothing and are gone are kept.
OFFERED = ("low-rank", *dict.fromkeys(kind for ways in RECOMMENDED.values() for kind, _ in ways.values()))
#: What else there is below four bits.
RIVALS = (
    ("low-rank-2-bit", 0.11),
    ("low-rank-nf4", 0.07),
    ("low-rank-2-bit", 0.05),
)
#: From the literature, for text; see ``quality_baselines.py``.
BASELINES = (
    ("pruned-nf4", 0.17),
    ("hqq", 0.16),
    ("pruned-nf4", 0.11),
    ("hqq", 0.22),
    ("pruned", 0.28),
    ("depth", 0.28),
)
#: Other ways to make emulators of a kind, one of which might be its default.
VARIANTS: dict[str, dict[str, Any]] = {
    "nf4-plain": {"kind": "nf4", "calibration": "none"},
    "nf4-vocabulary": {"kind": "nf4", "keep": None},
    "low-rank-paper": {"kind": "low-rank", "calibration": "base"},
    "low-rank-svd": {"kind": "low-rank", "calibration": "base", "factorizer": "svd"},
    "low-rank-asvd": {"kind": "low-rank", "calibration": "base", "factorizer": "asvd"},
    "low-rank-global": {"kind": "low-rank", "calibration": "base", "allocator": "global"},
    "low-rank-propagated": {"kind": "low-rank", "allocator": "uniform"},
    "low-rank-nf4-64": {"kind": "low-rank-nf4", "samples": 64},
    "low-rank-nf4-uniform-64": {"kind": "low-rank-nf4", "samples": 64, "allocator": "uniform"},
}
#: Memories that variants of a kind are measured at.
VARIED = {"nf4": (0.28,), "low-rank": (0.28, 0.6, 0.11), "low-rank-nf4": (0.17, 0.11)}
#: Variants measured without exact steps: with factors, or compared only at the same memory.
WITHOUT_EXACT = [name for name in VARIANTS if name.startswith("low-rank") or name == "nf4-vocabulary"]
#: Rounds of ways that share their steps among several emulators, each fitted with the LoRA so far; and their memory.
ROUNDS = {
    "low-rank-nf4-twice": (2, 0.11),
    "trellis-twice": (2, 0.17),
    "low-rank-2-bit-twice": (2, 0.07),
    "low-rank-nf4-thrice": (3, 0.11),
}
VARIANTS |= {name: {"kind": name.rpartition("-")[0]} for name in ROUNDS}
#: Bytes of a number, scales included, where a stand-in's memory is given as a ratio.
BYTES = dict.fromkeys(("low-rank", "pruned", "depth"), 2.0) | dict.fromkeys(("low-rank-nf4", "pruned-nf4"), 4.5 / 8)
BYTES["low-rank-2-bit"] = 2.078 / 8  # at the widths of SmolLM2: rows of few numbers have a scale each
BYTES |= {name: BYTES[variant["kind"]] for name, variant in VARIANTS.items() if variant["kind"] in BYTES}
FULL, SCRATCH = "full", "exact"
#: The usual base of a task; a larger one, of another family; mixtures of experts, for text and for pictures.
DEMO, GEMMA, EXPERTS, READER = "demo", "gemma-3-270m", "smollm2-experts", "reading-experts"
MODELS = {DEMO: "SmolLM2 135M", GEMMA: "Gemma 3 270M", EXPERTS: "SmolLM2 135M, four experts",
          READER: "InternVL 3M, eight experts"}  # fmt: skip
MIXTURES = (EXPERTS, READER)
PARAMETERS = {DEMO: 135e6, GEMMA: 268e6, EXPERTS: 374e6}
#: What is usual of the LoRA and its steps.
BATCH, RANK, ALL, ATTENTION = 8, 8, "all", "attention"
#: How a LoRA is scaled: by alpha / rank; or, as by ``--use-rslora``, by alpha / sqrt(rank).
PLAIN, RSLORA = "plain", "rslora"
#: What tells LoRAs apart.
LORA = ("rank", "targets", "scaling")
USUAL_LORA = (RANK, ALL, PLAIN)
#: Steps of longer cells, which have one row each.
LONGER = (240, 960)
#: Steps on the mixture of experts, which take longest.
FEWER_STEPS = 30
#: The task of wider cells, where emulators differ most; one with short answers, for other lengths and models; and the
#: one with the longest, for mixtures of experts alone.
WIDER_TASK, SECOND_TASK, THIRD_TASK = "arithmetic", "classification", "extraction"


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        task: of :data:`TASKS`.
        kind: of emulator; or a variant of one; or a baseline; or ``full``, a LoRA on the base; or ``exact``, exact
            steps from scratch.
        memory: of the block Linears; 1 for controls.
        seed: of the rows and of the tuning.
        steps: of the tuning.
        learning_rate: of the tuning.
        model: ``demo``, the usual base of the task; or another one.
        batch: rows per step.
        rank: of the LoRA; its alpha is twice that.
        targets: where the LoRA is: on ``all`` block Linears, or on those of ``attention`` alone.
        scaling: of the LoRA: ``plain`` or ``rslora``.
    """

    task: str
    kind: str
    memory: float
    seed: int
    steps: int
    learning_rate: float
    model: str = DEMO
    batch: int = BATCH
    rank: int = RANK
    targets: str = ALL
    scaling: str = PLAIN

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Cell":
        """Return the cell of a measurement, which leaves out what is as usual."""
        return cls(**{field.name: row[field.name] for field in fields(cls) if field.name in row})

    @property
    def values(self) -> dict[str, Any]:
        """What describes the cell, without what is as usual."""
        return {field.name: value for field in fields(self)
                if (value := getattr(self, field.name)) != field.default}  # fmt: skip

    @property
    def is_wider(self) -> bool:
        """Whether it leaves the usual set-up: another model, length, batch or LoRA."""
        lengths, further = {STEPS, STEPS + EXACT[-1], EXACT[-1]}, {"model", "batch", *LORA}
        return self.steps not in lengths or not further.isdisjoint(self.values)

    @property
    def forgets(self) -> bool:
        """Whether what its LoRA forgets is measured, which takes a model of text."""
        return self.is_wider and self.task in TEXTS

    @property
    def is_polished(self) -> bool:
        """Whether exact steps are taken beyond the usual set-up: on the larger model, and after the longest tuning.

        After the latter the LoRA on the base takes them too.
        """
        return self.steps == LONGER[-1] if self.model == DEMO else (self.model, self.steps) == (GEMMA, STEPS)

    @property
    def dtype(self) -> str:
        """What emulators are loaded in to be measured.

        Asked for fp32, transformers leaves some weights of a vision tower in four bits as they are.
        """
        return "auto" if self.task == PICTURES else "float32"

    @property
    def ratio(self) -> float | None:
        """The ratio of that memory; None if the kind has no ratio."""
        if self.kind not in BYTES:
            return None
        return round(self.memory * 2 / BYTES[self.kind], 4)

    @property
    def name(self) -> str:
        """A name for its directory."""
        usual = f"{self.task}-{self.kind}-{self.memory:g}-{self.seed}-{self.steps}-{self.learning_rate:g}"
        other = {"model": self.model, "batch": f"batch{self.batch}", "rank": f"rank{self.rank}",
                 "targets": self.targets, "scaling": self.scaling}  # fmt: skip
        return "-".join([usual, *(text for name, text in other.items() if name in self.values)])


def cells(seeds: int, measured: Sequence[dict[str, Any]]) -> Iterator[Cell]:
    """Return all cells, the most telling first.

    Further seeds of text are measured at the learning rate that is best so far; of pictures, where few selection rows
    say little, at the two likeliest.
    """
    recommendations = (RECOMMENDED[task][memory] for memory in reversed(MEMORIES) for task in TASKS)
    recommended = list(dict.fromkeys(recommendations))
    plain = [("low-rank", memory) for memory in MEMORIES[::-1]]
    rounds = [(name, memory) for name, (_, memory) in ROUNDS.items()]
    variants = [
        (name, memory)
        for name, variant in VARIANTS.items()
        if name not in ROUNDS
        for memory in VARIED.get(variant["kind"], ())
    ]
    longer = STEPS + EXACT[-1]

    def first(ways: Sequence[tuple[str, float]], steps: int = STEPS, rate: int = 0) -> Iterator[Cell]:
        for (kind, memory), task in product(ways, TASKS):
            if task in TEXTS or (kind, memory) not in BASELINES:
                yield Cell(task, kind, memory, 0, steps, LEARNING_RATES[task][rate])

    def likely(task: str, kind: str, memory: float, steps: int = STEPS) -> Sequence[float]:
        return LEARNING_RATES[task][:2] if task == PICTURES else (best_rate(measured, task, kind, memory, steps),)

    yield from first([(FULL, 1), *recommended])
    yield from first([(FULL, 1)], longer)
    yield from first([*RIVALS, *BASELINES])
    for rate, steps in product((1, 2), (STEPS, longer)):
        yield from first([(FULL, 1)], steps, rate)
    for rate in range(3):
        yield from first([(SCRATCH, 1)], EXACT[-1], rate)
    yield from first(plain)
    yield from (
        Cell(task, *way, 0, STEPS, best_rate(measured, task, VARIANTS[way[0]]["kind"], way[1]))
        for way, task in [*product(variants, TASKS), *product(rounds, TEXTS)]
    )
    for rate in (1, 2):
        yield from first([*recommended, *RIVALS, *plain, *BASELINES], rate=rate)
    for seed, task in product(range(1, seeds), TASKS):
        for steps in (STEPS, longer):
            yield from (Cell(task, FULL, 1, seed, steps, rate) for rate in likely(task, FULL, 1, steps))
        for way in (*recommended, *RIVALS, *plain, *variants, *(rounds if task in TEXTS else [])):
            yield from (Cell(task, *way, seed, STEPS, rate) for rate in likely(task, *way))
        yield from (Cell(task, SCRATCH, 1, seed, EXACT[-1], rate) for rate in likely(task, SCRATCH, 1, EXACT[-1]))


def wider_ways() -> list[tuple[str, float]]:
    """Return kind and memory of the emulators of wider cells, the most usual first."""
    return [RECOMMENDED[WIDER_TASK][memory] for memory in (0.17, 0.28, 0.11)]


def wider_cells() -> Iterator[Cell]:
    """Return the cells beyond the usual set-up, the most telling first: one seed, one learning rate."""
    control: tuple[str, float] = (FULL, 1)
    small, usual, smaller = wider_ways()
    rate, lower, _ = LEARNING_RATES[WIDER_TASK]

    yield from (Cell(WIDER_TASK, *way, 0, STEPS, rate, GEMMA) for way in (control, small, usual))
    yield Cell(WIDER_TASK, *control, 0, STEPS + EXACT[-1], rate, GEMMA)
    for task, steps, way in product((WIDER_TASK, SECOND_TASK), reversed(LONGER), (control, small, smaller, usual)):
        yield Cell(task, *way, 0, steps, lower, batch=1)
    yield from (Cell(WIDER_TASK, *way, 0, LONGER[0], lower, GEMMA, batch=1) for way in (control, small))
    others: Sequence[dict[str, Any]] = ({"rank": 64}, {"targets": ATTENTION}, {"rank": 16}, {"rank": 4},
                                       {"scaling": RSLORA})  # fmt: skip
    for other in others:
        yield from (Cell(WIDER_TASK, *way, 0, STEPS, rate, **other) for way in (control, small))
    factors = ("low-rank", usual[1])
    of_experts = product((WIDER_TASK, SECOND_TASK, THIRD_TASK), (control, usual, small, factors))
    yield from (Cell(task, *way, 0, FEWER_STEPS, rate, EXPERTS) for task, way in of_experts)
    yield from (Cell(SECOND_TASK, *way, 0, STEPS, rate, GEMMA) for way in (control, small, usual))
    for way in (control, usual, small, RECOMMENDED[PICTURES][0.17], factors):
        yield Cell(PICTURES, *way, 0, STEPS, LEARNING_RATES[PICTURES][0], READER)


def best_rate(rows: Sequence[dict[str, Any]], task: str, kind: str, memory: float, steps: int = STEPS) -> float:
    """Return the learning rate with the least loss of the base on the selection rows of the first seed."""
    wanted: dict[str, Any] = {"task": task, "kind": kind, "memory": memory, "seed": 0, "steps": steps}
    tried = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return float(best_of(tried)["learning_rate"]) if tried else LEARNING_RATES[task][0]


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return, of measurements at several learning rates, that with the least loss on the selection rows.

    A measurement at one rate alone need not have that loss.
    """
    return min(rows, key=_selection) if len(rows) > 1 else rows[0]


def _selection(row: dict[str, Any]) -> float:
    """Return the loss on the selection rows; of an emulator's LoRA, as it was corrected."""
    if "selection" in row:
        return float(row["selection"])
    chosen = row["chosen"].items()
    return next(float(candidate["nll"]) for candidate in row["candidates"] if chosen <= candidate.items())
