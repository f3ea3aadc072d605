"""Loss and answers of the base after each way to tune, at equal memory of the block Linears.

Three tasks are text, for SmolLM2-135M-Instruct; one has pictures, for the demo's small InternVL.

For hours: every measurement is added to ``results/quality.json`` as soon as it is made and not repeated, so that the
benchmark can be interrupted at any time and continued, on another machine too. The most telling come first.

A measurement is one *cell*: a task, a kind of emulator, its memory and a seed. It makes the emulator, tunes a LoRA on
it for 60 steps of 8 rows, carries it over to the base uncorrected, with the paper's clamp and with ``auto``, and takes
10 and 20 exact steps from there. Variants of kinds with factors alone, which are there to say which should be their
default, take none. Controls are LoRAs of 60 and 80 steps on the base itself, and exact steps from scratch. Of three
learning rates the one with the least loss of the base on the selection rows counts. Baselines from the literature
(``quality_baselines.py``) are carried over as they are. The loss is the NLL per token of the answers of 160 test rows;
that of the emulator itself, which is nobody's goal, of 64 of them. All else is done by the toolkit's stages.

Memory is the share of the bytes of the block Linears. Recovery is the part of what a LoRA of as many steps in all on
the base gains over the base alone: ``(base - x) / (base - full)``; all three on the same base, with the same seed.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import svd
from emloc_demo.model import write_base
from harness import RESULTS, in_process
from quality_cells import BASELINES, EXACT, FULL, LOW_RANK, PICTURES, SCRATCH, TASKS, VARIANTS, Cell, cells
from quality_pictures import picture_sets, write_reader
from quality_report import report
from quality_rows import make_sets

from emloc_core.files.meter import Meter


def measure(directory: str, values: dict[str, Any]) -> dict[str, Any]:
    """Measure a cell; called in a process of its own."""
    cell, root = Cell(**values), Path(directory)
    place = root / cell.name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    started = time.perf_counter()
    rows, base = write_rows(place, cell, root), base_of(cell.task, root)
    work = {FULL: control, SCRATCH: control} | dict.fromkeys((kind for kind, _ in BASELINES), baseline)
    found = work.get(cell.kind, emulated)(base, place, cell, rows)
    shutil.rmtree(place)
    peak = max(stage["peak_rss_bytes"] for stage in found["stages"].values())
    seconds = round(time.perf_counter() - started)
    return {**values, "base": digest(base), **found, "seconds": seconds, "peak_rss_bytes": peak}


def base_of(task: str, root: Path) -> Path:
    """Return a task's base in bf16, as models are published; it is made once."""
    place = root / ("reading-base" if task == PICTURES else "base")
    if place.exists():
        return place
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    partial, whole = (place.with_name(f".{place.name}.{name}") for name in ("partial", "fp32"))
    for each in (partial, whole):
        shutil.rmtree(each, ignore_errors=True)
    make: Callable[[Path], Path]
    if task == PICTURES:
        make, model, processing = write_reader, AutoModelForImageTextToText, AutoProcessor
    else:
        make, model, processing = write_base, AutoModelForCausalLM, AutoTokenizer
    source = make(whole)
    model.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(partial)
    processing.from_pretrained(source).save_pretrained(partial)
    shutil.rmtree(source)
    partial.rename(place)
    return place


def digest(base: Path) -> str:
    """Return the first digits of the hash of a base's weights: one that is trained differs from machine to machine."""
    with (base / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def write_rows(place: Path, cell: Cell, root: Path) -> dict[str, Path]:
    """Write the rows of a cell, and return their files."""
    sets = picture_sets(cell.seed, root) if cell.task == PICTURES else make_sets(cell.task, cell.seed, root)
    files = {name: place / f"{name}.jsonl" for name in sets}
    for name, rows in sets.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def control(base: Path, place: Path, cell: Cell, rows: dict[str, Path]) -> dict[str, Any]:
    """Tune the base itself, and measure it."""
    metered = Metered()
    adapter = trained(base, place / "adapter", cell, rows, metered, exact=cell.kind == SCRATCH)
    scored = Scores(base, rows["test"])
    selection = Scores(base, rows["selection"]).of(adapter)["nll"]
    systems = {"base": scored.of(None), cell.kind: scored.of(adapter)}
    return {"systems": systems, "selection": selection, "stages": metered.stages}


def tuned(base: Path, place: Path, cell: Cell, rows: dict[str, Path], metered: "Metered") -> tuple[float, Path, Path]:
    """Make an emulator, and tune a LoRA on it; return the emulator's share of the memory, and both directories."""
    from emloc_core.data.rows import load_rows
    from emloc_core.emulator.compress import Compress
    from emloc_core.plugins.manager import plugin_manager
    from emloc_core.requests import CompressRequest
    from emloc_core.settings import CompressSettings
    from emloc_core.standins.registry import format_named

    plugin_manager().register(svd)
    given = {"kind": cell.kind, "seed": cell.seed, "selection": 0} | VARIANTS.get(cell.kind, {})
    if cell.ratio is not None:
        given["ratio"] = cell.ratio
    given["kind"] = given.pop("factorizer", given["kind"])
    usual = format_named(given["kind"]).samples
    samples = load_rows(str(rows["calibration"]))[: given.get("samples", usual)]
    settings = CompressSettings(**given | {"samples": len(samples)})
    place_of = {"model": str(base), "output": place / "emulator"}
    compress = Compress(CompressRequest(**place_of, data=samples, settings=settings))
    share = taken(compress)
    emulator = metered("compress", compress.run)
    return share, emulator, trained(emulator, place / "adapter", cell, rows, metered)


def trained(
    model: Path, output: Path, cell: Cell, rows: dict[str, Path], metered: "Metered", *, exact: bool = False
) -> Path:
    """Tune a LoRA on a model by ordinary steps, or by exact ones; return its directory."""
    from emloc_core.requests import TrainRequest
    from emloc_core.settings import TrainSettings
    from emloc_core.tuning.exact import prepare

    how = {"gradient_checkpointing": False, "logging_steps": 1, "lora_rank": 8}
    settings = TrainSettings(steps=cell.steps, learning_rate=cell.learning_rate, seed=cell.seed, **how)
    asked = TrainRequest(model=str(model), data=str(rows["tuning"]), output=output, exact=exact, settings=settings)
    adapter: Path = metered("train", prepare(asked).run)
    return adapter


def corrected(adapter: Path, base: Path, rows: dict[str, Path], clamp: float | str, output: Path) -> Path:
    """Carry a LoRA over to the base; return its directory."""
    from emloc_core.adapters.correct import prepare
    from emloc_core.requests import CorrectRequest
    from emloc_core.settings import CorrectSettings

    asked = {"adapter": adapter, "base": str(base), "output": output, "settings": CorrectSettings(clamp=clamp)}
    if clamp == "auto":
        asked["selection_data"] = rows["selection"]
    return prepare(CorrectRequest(**asked)).run()


def emulated(base: Path, place: Path, cell: Cell, rows: dict[str, Path]) -> dict[str, Any]:
    """Make an emulator, tune a LoRA on it, carry it over, take exact steps, and measure it all."""
    from emloc_core.files.output import read_manifest

    metered = Metered()
    share, emulator, adapter = tuned(base, place, cell, rows, metered)
    carried = {
        name: metered(name, lambda name=name, clamp=clamp: corrected(adapter, base, rows, clamp, place / name))
        for name, clamp in (("paper", 3.0), ("auto", "auto"))
    }
    # Variants say which should be the default, and further seeds how far what the base gets varies: less is enough.
    with_exact = cell.kind not in LOW_RANK
    in_full = with_exact and cell.seed == 0
    exact_rate, exact = polish(cell, carried["auto"], base, rows, metered) if with_exact else (None, {})
    # Asked for fp32, transformers leaves some weights of a vision tower in four bits as they are.
    dtype = "auto" if cell.task == PICTURES else "float32"
    on_emulator, on_base = Scores(emulator, rows["test"], 64, dtype), Scores(base, rows["test"])
    systems = {"emulator": on_emulator.of(None), "tuned": on_emulator.of(adapter)} if in_full else {}
    systems |= {"uncorrected": on_base.of(adapter), "paper": on_base.of(carried["paper"])}
    auto = (read_manifest(carried["auto"]) or {})["result"]
    same = {0: "uncorrected", 3: "paper"}.get(auto["clamp"]) if auto.get("scale", 1) == 1 else None
    systems["auto"] = systems[same] if same else on_base.of(carried["auto"])
    systems |= {name: on_base.of(path) for name, path in exact.items()}
    errors = [linear["relative_error"] for linear in (read_manifest(emulator) or {})["result"]["linears"]]
    return {
        "share": round(share, 4),
        "relative_error": round(mean(error for error in errors if error is not None), 4),
        "chosen": {name: auto[name] for name in auto if name in ("clamp", "scale")},
        "candidates": auto["candidates"],
        "exact_rate": exact_rate,
        "exact_moments": True,
        "systems": systems,
        "stages": metered.stages,
    }


def baseline(base: Path, place: Path, cell: Cell, rows: dict[str, Path]) -> dict[str, Any]:
    """Make a baseline's stand-in, tune a LoRA on it, carry it over as it is, take exact steps, and measure it all."""
    from quality_baselines import make, on_the_base

    metered = Metered()
    made = metered("compress", lambda: make(cell.kind, cell.memory, base, rows["calibration"], place / "emulator"))
    adapter = trained(place / "emulator", place / "adapter", cell, rows, metered)
    carried = on_the_base(adapter, made, base, place / "carried")
    exact_rate, exact = polish(cell, carried, base, rows, metered)
    on_emulator, on_base = Scores(place / "emulator", rows["test"], 64), Scores(base, rows["test"])
    systems = {"emulator": on_emulator.of(None), "tuned": on_emulator.of(adapter)}
    systems |= {name: on_base.of(path) for name, path in {"uncorrected": carried, **exact}.items()}
    return {
        "share": round(made.share, 4),
        "selection": Scores(base, rows["selection"]).of(carried)["nll"],
        "exact_rate": exact_rate,
        "exact_moments": True,
        "systems": systems,
        "stages": metered.stages,
    }


class Metered:
    """Calls functions, and keeps what each took: seconds, and the process's peak memory meanwhile."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}

    def __call__(self, stage: str, function: Callable[[], Any]) -> Any:
        """Call a function without arguments as a stage."""
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
        meter = Meter()
        found = function()
        taken = meter.read()
        self.stages[stage] = {name: taken[name] for name in ("seconds", "peak_rss_bytes")}
        return found


def polish(
    cell: Cell, adapter: Path, base: Path, rows: dict[str, Path], metered: Metered
) -> tuple[float, dict[str, Path]]:
    """Take exact steps from an adapter; return their learning rate, and the results by name.

    The rate is half of that of tuning, or a quarter: the better of the two by the loss on the selection rows.
    """
    selection = Scores(base, rows["selection"])

    def steps(count: int, rate: float) -> Path:
        output = adapter.with_name(f"polish{count}-{rate:g}")
        return metered(f"polish{count}", lambda: polished(adapter, base, rows, count, rate, cell.seed, output))

    *fewer, most = EXACT
    # Stages with as many steps share a name: what the last one took is kept.
    tried = {rate: steps(most, rate) for rate in (cell.learning_rate / 2, cell.learning_rate / 4)}
    rate = min(tried, key=lambda rate: selection.of(tried[rate])["nll"])
    found = {most: tried[rate]} | {count: steps(count, rate) for count in fewer}
    return rate, {f"polish{count}": path for count, path in sorted(found.items())}


def polished(
    adapter: Path, base: Path, rows: dict[str, Path], steps: int, rate: float, seed: int, output: Path
) -> Path:
    """Take exact steps from an adapter; return the directory of the LoRA."""
    from emloc_core.requests import PolishRequest
    from emloc_core.settings import PolishSettings
    from emloc_core.tuning.exact import Polish

    settings = PolishSettings(steps=steps, learning_rate=rate, seed=seed + 1000)  # other rows first than in tuning
    place = {"adapter": adapter, "base": str(base), "output": output}
    return Polish(PolishRequest(**place, data=str(rows["tuning"]), settings=settings)).run()


def taken(compress: Any) -> float:
    """Return the share of the base's bytes that the block Linears take in an emulator that is to be made."""
    dtype = compress.base.skeleton.dtype
    linears = [(linear, (linear.out_features, linear.in_features)) for linear in compress.plan.candidates]
    held = sum(compress.format.nbytes(shape, linear.rank, dtype) for linear, shape in linears)
    return held / sum(m * n * dtype.itemsize for _, (m, n) in linears)


class Scores:
    """Losses of a model with different LoRAs on the same rows."""

    def __init__(self, model: Path, rows: Path, limit: int | None = None, dtype: str = "float32") -> None:
        from emloc_core.data.rows import load_rows
        from emloc_core.data.tokenize import encode
        from emloc_core.files.pretrained import load_model
        from emloc_core.model.opened import open_model

        opened, kept = open_model(str(model)), load_rows(str(rows))[:limit]
        self.samples = encode(kept, opened.processing(kept))
        self.load = lambda: load_model(opened.family.auto_class, model, dtype=dtype).eval()

    def of(self, adapter: Path | None) -> dict[str, Any]:
        """Return the loss per token, the share of rows that greedy decoding would write right, and each row's loss."""
        import torch
        from torch.nn import functional

        from emloc_core.files.pretrained import load_lora

        model = self.load()
        model = load_lora(model, adapter) if adapter else model
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


def known_rows() -> list[dict[str, Any]]:
    """Return the measurements that there are."""
    results = RESULTS / "quality.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"] if results.exists() else []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("build/quality"), help="for work in progress")
    parser.add_argument("--task", action="append", choices=TASKS, help="only this task; may be repeated")
    parser.add_argument("--kind", action="append", help="only this kind, or 'full' or 'exact'; may be repeated")
    parser.add_argument("--memory", action="append", type=float, help="only this memory; may be repeated")
    parser.add_argument("--seed", action="append", type=int, help="only this seed; may be repeated")
    parser.add_argument("--learning-rate", action="append", type=float, help="only this rate; may be repeated")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--minutes", type=float, help="begin no measurement after this time")
    parser.add_argument("--again", action="store_true", help="measure again what is chosen")
    parser.add_argument("--list", action="store_true", help="only list what is chosen")
    options = parser.parse_args()

    def chosen(cell: Cell) -> bool:
        asked = (
            (options.task, cell.task), (options.kind, cell.kind), (options.memory, cell.memory),
            (options.seed, cell.seed), (options.learning_rate, cell.learning_rate),
        )  # fmt: skip
        return all(not names or value in names for names, value in asked)

    root: Path = options.directory
    root.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    rows = known_rows()
    for cell in cells(options.seeds, rows):
        old = [row for row in rows if all(row.get(name) == value for name, value in asdict(cell).items())]
        if not chosen(cell) or (old and not options.again):
            continue
        if options.list:
            print(cell.name)
            continue
        if time.monotonic() > end:
            break
        print(f"{time.strftime('%H:%M:%S')} {cell.name}", file=sys.stderr, flush=True)
        new = in_process(measure, root, asdict(cell))
        # A base that is trained on another machine is another one, whose measurements stay. Read again, since another
        # process may measure other tasks; and in place, since the next cells depend on the rates that are best so far.
        rows[:] = [row for row in known_rows() if row not in old or row["base"] != new["base"]] + [new]
        report(rows)
    if rows and not options.list:
        report(known_rows())


if __name__ == "__main__":
    main()
