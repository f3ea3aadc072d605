"""What each way to tune gives the base: SmolLM2-135M-Instruct on three tasks, at equal memory of the block Linears.

For hours: every measurement is added to ``results/quality.json`` as soon as it is made and not repeated, so that the
benchmark can be interrupted at any time and continued, on another machine too. The most telling come first.

A measurement is one *cell*: a task, a kind of emulator, its memory and a seed. It makes the emulator, tunes a LoRA on
it for 60 steps of 8 rows, carries it over to the base uncorrected, with the paper's clamp and with ``auto``, and takes
10 and 20 exact steps from there. Controls are LoRAs of 60 and 80 steps on the base itself, at three learning rates of
which the one with the least loss on the selection rows counts, and exact steps from scratch. The loss is the NLL per
token of the answers of 160 test rows; that of the emulator itself, which is nobody's goal, of 64 of them. Everything is
done by the toolkit's own stages.

Memory is the share of the bytes of the block Linears. Recovery is the part of what a LoRA of as many steps in all on
the base gains over the base alone: ``(base - x) / (base - full)``.
"""

import argparse
import itertools
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from emloc_demo.model import write_base
from harness import RESULTS, goal, in_process, markdown, write_results
from quality_rows import TASKS, make_sets

STEPS, EXACT = 60, (10, 20)
LEARNING_RATE = 1e-3
#: Those that a LoRA on the base may choose from.
LEARNING_RATES = (1e-3, 5e-4, 2e-3)
MEMORIES = (0.11, 0.17, 0.28, 0.6)
#: Kind of the emulator that is recommended for a memory; four-bit weights take no more than 0.28 at 0.6 either.
RECOMMENDED = {0.11: ("low-rank-nf4", 0.11), 0.17: ("low-rank-nf4", 0.17), 0.28: ("nf4", 0.28), 0.6: ("nf4", 0.28)}
#: Bytes of a number of the factors, scales included, where a kind has ranks.
BYTES = {"low-rank": 2, "low-rank-nf4": 4.5 / 8}
FULL, SCRATCH = "full", "exact"
#: Recovery that is aimed at, by memory: without exact steps, and with 20.
GOALS = {0.6: (0.95, 0.97), 0.28: (0.95, 0.97), 0.17: (0.85, 0.95), 0.11: (0.75, 0.92)}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        task: see :data:`quality_rows.TASKS`.
        kind: of emulator; or ``full``, a LoRA on the base, or ``exact``, exact steps from scratch.
        memory: of the block Linears; 1 for controls.
        seed: of the rows and of the tuning.
        steps: of the tuning.
        learning_rate: of the tuning.
    """

    task: str
    kind: str
    memory: float
    seed: int
    steps: int = STEPS
    learning_rate: float = LEARNING_RATE

    @property
    def name(self) -> str:
        """A name for its directory."""
        return f"{self.task}-{self.kind}-{self.memory:g}-{self.seed}-{self.steps}-{self.learning_rate:g}"


def measure(directory: str, values: dict[str, Any]) -> dict[str, Any]:
    """Measure a cell; called in a process of its own."""
    cell, root = Cell(**values), Path(directory)
    place = root / cell.name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    started = time.perf_counter()
    rows = write_rows(place, cell, root)
    work = control if cell.kind in (FULL, SCRATCH) else emulated
    found = work(root / "base", place, cell, rows)
    shutil.rmtree(place)
    return {**values, **found, "seconds": round(time.perf_counter() - started)}


def write_rows(place: Path, cell: Cell, root: Path) -> dict[str, Path]:
    """Write the rows of a cell, and return their files."""
    sets = make_sets(cell.task, cell.seed, root)
    files = {name: place / f"{name}.jsonl" for name in sets}
    for name, rows in sets.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def control(base: Path, place: Path, cell: Cell, rows: dict[str, Path]) -> dict[str, Any]:
    """Tune the base itself, and measure it."""
    from emloc_core.settings import TrainSettings
    from emloc_core.tuning.exact import ExactTrain
    from emloc_core.tuning.train import Train

    settings = TrainSettings(steps=cell.steps, learning_rate=cell.learning_rate, seed=cell.seed, **_HOW)
    train: Any = ExactTrain if cell.kind == SCRATCH else Train
    adapter = train(base, str(rows["tuning"]), place / "adapter", settings).run()
    scored = Scores(base, rows["test"])
    selection = Scores(base, rows["selection"]).of(adapter)["nll"]
    return {"systems": {"base": scored.of(None), cell.kind: scored.of(adapter)}, "selection": selection}


_HOW = {"gradient_checkpointing": False, "logging_steps": 1, "lora_rank": 8}


def emulated(base: Path, place: Path, cell: Cell, rows: dict[str, Path]) -> dict[str, Any]:
    """Make an emulator, tune a LoRA on it, carry it over, take exact steps, and measure it all."""
    from emloc_core.adapters.adapter import Adapter
    from emloc_core.adapters.correct import Correct
    from emloc_core.data.rows import load_rows
    from emloc_core.emulator.compress import Compress
    from emloc_core.files.checkpoint import Checkpoint
    from emloc_core.files.output import read_manifest
    from emloc_core.settings import CompressSettings, CorrectSettings, PolishSettings, TrainSettings
    from emloc_core.tuning.exact import Polish
    from emloc_core.tuning.train import Train

    checkpoint, tuning = Checkpoint(base), str(rows["tuning"])
    seconds = {}

    def timed(stage: str, job: Any) -> Any:
        started = time.perf_counter()
        output = job.run()
        seconds[stage] = round(time.perf_counter() - started, 1)
        return output

    given: dict[str, Any] = {"kind": cell.kind, "seed": cell.seed, "selection": 0}
    if cell.kind in BYTES:
        given["ratio"] = round(cell.memory * 2 / BYTES[cell.kind], 4)
    compress = Compress(checkpoint, load_rows(str(rows["calibration"])), place / "emulator", CompressSettings(**given))
    share = taken(compress)
    emulator = timed("compress", compress)
    tune = TrainSettings(steps=cell.steps, learning_rate=cell.learning_rate, seed=cell.seed, **_HOW)
    adapter = timed("train", Train(emulator, tuning, place / "adapter", tune))
    corrected = {
        name: timed(name, Correct(Adapter(adapter), checkpoint, place / name, CorrectSettings(clamp=clamp),
                                  selection=rows["selection"]))
        for name, clamp in (("paper", 3.0), ("auto", "auto"))
    }  # fmt: skip
    polished = {}
    for steps in EXACT if cell.seed == 0 else EXACT[-1:]:  # other rows first than in tuning
        how = PolishSettings(steps=steps, learning_rate=cell.learning_rate, seed=cell.seed + 1000)
        job = Polish(Adapter(corrected["auto"]), checkpoint, tuning, place / f"polish{steps}", how)
        polished[f"polish{steps}"] = timed(f"polish{steps}", job)
    on_emulator, on_base = Scores(emulator, rows["test"], 64), Scores(base, rows["test"])
    systems = {"emulator": on_emulator.of(None), "tuned": on_emulator.of(adapter), "uncorrected": on_base.of(adapter)}
    auto = (read_manifest(corrected["auto"]) or {})["result"]
    systems["paper"] = on_base.of(corrected["paper"])
    same = {0: "uncorrected", 3: "paper"}.get(auto["clamp"]) if auto.get("scale", 1) == 1 else None
    systems["auto"] = systems[same] if same else on_base.of(corrected["auto"])
    systems |= {name: on_base.of(path) for name, path in polished.items()}
    errors = [linear["relative_error"] for linear in (read_manifest(emulator) or {})["result"]["linears"]]
    return {
        "share": round(share, 4),
        "relative_error": round(mean(error for error in errors if error is not None), 4),
        "chosen": {name: auto[name] for name in auto if name in ("clamp", "scale")},
        "candidates": auto["candidates"],
        "systems": systems,
        "stage_seconds": seconds,
    }


def taken(compress: Any) -> float:
    """Return the share of the base's bytes that the block Linears take in an emulator that is to be made."""
    dtype = compress.skeleton.dtype
    linears = [(linear, (linear.out_features, linear.in_features)) for linear in compress.plan.candidates]
    held = sum(compress.kind.nbytes(shape, linear.rank, dtype) for linear, shape in linears)
    return held / sum(m * n * dtype.itemsize for _, (m, n) in linears)


class Scores:
    """Losses of a model with different LoRAs on the same rows."""

    def __init__(self, model: Path, rows: Path, limit: int | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import emloc_core.lowrank  # noqa: F401 - emulators load from here on
        from emloc_core.data.rows import load_rows
        from emloc_core.data.tokenize import encode

        self.samples = encode(load_rows(str(rows))[:limit], AutoTokenizer.from_pretrained(model))
        self.load = lambda: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def of(self, adapter: Path | None) -> dict[str, Any]:
        """Return the loss per token, the share of rows that greedy decoding would write right, and each row's loss."""
        import torch
        from peft import PeftModel
        from torch.nn import functional

        model = self.load()
        model = PeftModel.from_pretrained(model, adapter) if adapter else model
        losses, tokens, exact = [], 0, 0
        with torch.no_grad():
            for sample in self.samples:
                inputs = sample.inputs("cpu")
                counted = torch.tensor(sample.completion_mask[1:], dtype=torch.bool)
                targets = inputs["input_ids"][0, 1:][counted]
                last = {"use_cache": False, "logits_to_keep": len(targets) + 1}  # answers end their rows
                logits = model(**inputs, **last).logits[0, :-1].float()
                losses.append(float(functional.cross_entropy(logits, targets, reduction="sum")))
                tokens += len(targets)
                exact += bool((logits.argmax(-1) == targets).all())
        return {
            "nll": round(sum(losses) / tokens, 5),
            "exact_match": round(exact / len(losses), 4),
            "losses": " ".join(f"{loss:.3f}" for loss in losses),  # in one line of the results
        }


def cells(seeds: int, known: Sequence[dict[str, Any]]) -> Iterator[Cell]:
    """Return all cells, the most telling first; learning rates of further seeds are those found best so far."""
    tasks = list(TASKS)
    recommended = list(dict.fromkeys(RECOMMENDED[memory] for memory in reversed(MEMORIES)))
    yield from (Cell(task, FULL, 1, 0) for task in tasks)
    yield from (Cell(task, *way, 0) for way in recommended for task in tasks)
    yield from (Cell(task, FULL, 1, 0, STEPS + EXACT[-1]) for task in tasks)
    rates = itertools.product(LEARNING_RATES[1:], (STEPS, STEPS + EXACT[-1]), tasks)
    yield from (Cell(task, FULL, 1, 0, steps, rate) for rate, steps, task in rates)
    yield from (Cell(task, SCRATCH, 1, 0, EXACT[-1]) for task in tasks)
    others = [(kind, memory) for memory in MEMORIES[::-1] for kind in ("low-rank",)]
    yield from (Cell(task, *way, 0) for way in others for task in tasks)
    for seed in range(1, seeds):
        for task in tasks:
            yield from (
                Cell(task, FULL, 1, seed, steps, best_rate(known, task, steps)) for steps in (STEPS, STEPS + EXACT[-1])
            )
        yield from (Cell(task, *way, seed) for way in recommended for task in tasks)
        yield from (Cell(task, SCRATCH, 1, seed, EXACT[-1]) for task in tasks)


def best_rate(rows: Sequence[dict[str, Any]], task: str, steps: int) -> float:
    """Return the learning rate of a LoRA on the base with the least loss on the selection rows of the first seed."""
    tried = [row for row in rows if (row["task"], row["kind"], row["seed"], row["steps"]) == (task, FULL, 0, steps)]
    return min(tried, key=lambda row: row["selection"])["learning_rate"] if tried else LEARNING_RATE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("build/quality"), help="for work in progress")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this task; may be repeated")
    parser.add_argument("--kind", action="append", help="only this kind, or 'full' or 'exact'; may be repeated")
    parser.add_argument("--memory", action="append", type=float, help="only this memory; may be repeated")
    parser.add_argument("--seed", action="append", type=int, help="only this seed; may be repeated")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--minutes", type=float, help="begin no measurement after this time")
    parser.add_argument("--again", action="store_true", help="measure again what is chosen")
    parser.add_argument("--list", action="store_true", help="only list what is chosen")
    options = parser.parse_args()

    def chosen(cell: Cell) -> bool:
        asked = (options.task, cell.task), (options.kind, cell.kind), (options.memory, cell.memory)
        return all(not names or value in names for names, value in (*asked, (options.seed, cell.seed)))

    root: Path = options.directory
    root.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    results = RESULTS / "quality.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"] if results.exists() else []
    for cell in cells(options.seeds, rows):
        old = [row for row in rows if all(row.get(name) == value for name, value in asdict(cell).items())]
        if not chosen(cell) or (old and not options.again):
            continue
        if options.list:
            print(cell.name)
            continue
        if time.monotonic() > end:
            break
        write_bf16_base(root)
        print(f"{time.strftime('%H:%M:%S')} {cell.name}", file=sys.stderr, flush=True)
        rows = [row for row in rows if row not in old] + [in_process(measure, root, asdict(cell))]
        report(rows)
    if rows and not options.list:
        report(rows)


def write_bf16_base(root: Path) -> None:
    """Write the demo's base in bf16, the dtype of the published SmolLM2."""
    if (root / "base").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.rmtree(root / "fp32", ignore_errors=True)
    shutil.rmtree(root / ".base", ignore_errors=True)
    source = write_base(root / "fp32")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(root / ".base")
    AutoTokenizer.from_pretrained(source).save_pretrained(root / ".base")
    shutil.rmtree(source)
    (root / ".base").rename(root / "base")


class Table:
    """The measurements by what is asked of them."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def losses(self, task: str, seed: int, steps: int) -> tuple[float, float] | None:
        """Return the loss of the base alone and of the base with a LoRA of so many steps, or None."""
        rate = best_rate(self.rows, task, steps)
        wanted = (task, FULL, seed, steps, rate)
        keys = ("task", "kind", "seed", "steps", "learning_rate")
        row = next((row for row in self.rows if tuple(row[key] for key in keys) == wanted), None)
        return row and (row["systems"]["base"]["nll"], row["systems"][FULL]["nll"])

    def recovery(self, row: dict[str, Any], system: str) -> float | None:
        """Return the recovery of a system of a cell; the LoRA on the base has as many steps in all.

        Exact steps from scratch are compared with what polishing is compared with, to stand beside it.
        """
        steps = STEPS + (EXACT[-1] if system.startswith("polish") or system == SCRATCH else 0)
        losses = self.losses(row["task"], row["seed"], steps)
        if losses is None or system not in row["systems"]:
            return None
        base, full = losses
        return (base - row["systems"][system]["nll"]) / (base - full)

    def recoveries(self, task: str, kind: str, memory: float, system: str) -> list[float]:
        """Return the recovery of every seed that was measured."""
        matching = [row for row in self.rows if (row["task"], row["kind"], row["memory"]) == (task, kind, memory)]
        found = [self.recovery(row, system) for row in matching]
        return [each for each in found if each is not None]


#: What is reported of every cell, by its name there.
SYSTEMS = {"uncorrected": "uncorrected", "paper": "paper", "auto": "auto", "polish10": "polish10",
           "polish20": "polish20"}  # fmt: skip


def recovery_rows(table: Table) -> list[dict[str, Any]]:
    """Return ``recovery``: mean and spread over seeds of every system, of the recommended way under its own names."""
    found = []
    kinds = list(dict.fromkeys((row["kind"], row["memory"]) for row in table.rows if row["memory"] < 1))
    for task in TASKS:
        ways = [(f"{kind}+{system}", kind, memory, memory, system) for kind, memory in kinds for system in SYSTEMS]
        ways += [
            (name, *RECOMMENDED[memory], memory, system)
            for memory in MEMORIES
            for name, system in (("emloc", "auto"), ("emloc+polish20", "polish20"))
        ]
        ways.append((f"{SCRATCH}{EXACT[-1]}", SCRATCH, 1, 1, SCRATCH))
        for name, kind, key, memory, system in ways:
            if values := table.recoveries(task, kind, key, system):
                found.append({"task": task, "memory": memory, "system": name, "mean": round(mean(values), 4),
                              "spread": round(stdev(values), 4) if len(values) > 1 else None,
                              "seeds": len(values)})  # fmt: skip
    return found


def draw(recovery: Sequence[dict[str, Any]]) -> None:
    """Draw ``results/quality.svg``: recovery over memory, a panel for every task."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(4 * len(TASKS), 3.6), layout="constrained")
    FigureCanvasSVG(drawing)
    shown = ("emloc", "emloc+polish20", "low-rank+auto", "low-rank+polish20")
    for axes, task in zip(drawing.subplots(1, len(TASKS), sharey=True), TASKS, strict=True):
        for system in shown:
            rows = sorted(
                (row for row in recovery if (row["task"], row["system"]) == (task, system)),
                key=lambda row: row["memory"],
            )
            axes.errorbar([row["memory"] for row in rows], [row["mean"] for row in rows],
                          [row["spread"] or 0 for row in rows], marker="o", capsize=3, label=system)  # fmt: skip
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set(title=task, xlabel="memory of the block Linears")
    drawing.axes[0].set_ylabel("recovery")
    drawing.axes[0].legend(frameon=False, fontsize="small")
    drawing.savefig(RESULTS / "quality.svg")


def report(rows: list[dict[str, Any]]) -> None:
    """Write the results that there are: recovery, goals, and a line for every cell."""
    table = Table(rows)
    recovery = recovery_rows(table)
    goals = []
    for memory, aims in GOALS.items():
        for system, aim in zip(("emloc", "emloc+polish20"), aims, strict=True):
            means = [row["mean"] for row in recovery if (row["memory"], row["system"]) == (memory, system)]
            if len(means) == len(TASKS):
                value = round(mean(means), 3)
                goals.append(goal(f"recovery of {system} at {memory:g}, mean over tasks", aim, value, value >= aim))
    lines = []
    for row in sorted(rows, key=lambda row: (row["task"], row["memory"], row["kind"], row["seed"], row["steps"])):
        systems = row["systems"]
        shown = [systems[name]["nll"] if name in systems else "-" for name in ("emulator", "tuned", *SYSTEMS)]
        alone, own = (systems[name]["nll"] if name in systems else "-" for name in ("base", row["kind"]))
        lines.append([row["task"], row["kind"], row["memory"], row["seed"], row["steps"], row["learning_rate"],
                      alone, own, *shown, str(row.get("chosen", {}).get("clamp", "-")),
                      row["seconds"]])  # fmt: skip
    header = ["task", "kind", "memory", "seed", "steps", "learning rate", "base", "tuned on it", "emulator", "tuned",
              *SYSTEMS.values(), "clamp", "seconds"]  # fmt: skip
    text = (
        "NLL per token on 160 test rows; the last columns from *uncorrected* on are the base with that LoRA.\n\n"
        f"{markdown(header, [[str(value) for value in line] for line in lines])}\n\nRecovery:\n\n"
        + markdown(
            ["task", "memory", "system", "mean", "spread", "seeds"],
            [[str(row[key]) for key in ("task", "memory", "system", "mean", "spread", "seeds")] for row in recovery],
        )
    )
    write_results("quality", "make bench-quality", rows, goals, text)
    draw(recovery)
    file = RESULTS / "quality.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({"recovery": recovery, **content}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    random.seed(0)
    main()
