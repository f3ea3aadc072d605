"""Loss and answers of the base after each way to tune, at equal memory of the block Linears.

Three tasks are text, for SmolLM2-135M-Instruct; one has pictures, for the demo's small InternVL.

For hours: every measurement is added to ``results/quality.json`` as soon as it is made and not repeated, so that the
benchmark can be interrupted at any time and continued, on another machine too. The most telling come first.

A measurement is one *cell*: a task, a kind of emulator, its memory and a seed. It makes the emulator, tunes a LoRA on
it for 60 steps of 8 rows, carries it over to the base uncorrected, with the paper's clamp and with ``auto``, and takes
10 and 20 exact steps from there. Variants of kinds with factors alone, which serve to choose a default, take none; nor
does the variant whose output layer and embeddings are packed, as they are by default. Some kinds are tuned on in two
rounds, too, of half of the steps each. Controls are LoRAs of 60 and 80 steps on the base itself, and exact steps from
scratch. Of three learning rates, the one with the least loss of the base on the selection rows counts. Baselines from
the literature (``quality_baselines.py``) are carried over as they are. The loss is the NLL per token of the answers of
160 test rows; for the emulator itself, whose loss is no goal, of 64 of them. All else is done by the toolkit's stages.

Wider cells are of another model, more steps, or another rank or place of the LoRA; of one task, one seed and one
learning rate, with fewer rows to test and to select on. Those of more steps have one row per step. Exact steps are
taken on the larger model, and after the longest tuning, at half of the rate. Measured too: how far the emulator is from
the base, by KL divergence; and what is forgotten, by the loss on general text and on another task.

Memory is the share of the bytes of the block Linears. Recovery is the part of what a LoRA of as many steps in all on
the base gains over the base alone: ``(base - x) / (base - full)``; all three on the same base, with the same seed.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import svd
from harness import RESULTS, in_process
from quality_bases import base_of, digest
from quality_cells import (
    BASELINES,
    DEMO,
    FULL,
    GEMMA,
    PICTURES,
    ROUNDS,
    SCRATCH,
    VARIANTS,
    WITHOUT_EXACT,
    Cell,
    cells,
    wider_cells,
)
from quality_pictures import picture_sets
from quality_report import report
from quality_rows import SIZES, UNRELATED, make_sets, unrelated, without_chat
from quality_stages import Metered, Scores, corrected, emulator_share, polish, polish_once, trained

#: What cells may be chosen by.
AXES = {field.name: field.type for field in fields(Cell)}
#: Rows of wider cells, which have the first of the usual ones.
FEWER = {"selection": 32, "test": 80}


def measure(directory: str, values: dict[str, Any]) -> dict[str, Any]:
    """Measure a cell; called in a process of its own. One that was interrupted resumes after its last stage."""
    from emloc_core.plugins.manager import plugin_manager

    plugin_manager().register(svd)
    cell, root = Cell(**values), Path(directory)
    cell_directory = root / cell.name
    cell_directory.mkdir(exist_ok=True)
    started = time.perf_counter()
    rows, base = write_rows(cell_directory, cell, root), base_of(cell.model, cell.task, root)
    work = {FULL: control, SCRATCH: control, **dict.fromkeys(ROUNDS, in_rounds)}
    work |= dict.fromkeys((kind for kind, _ in BASELINES), baseline)
    measurement = work.get(cell.kind, wider if cell.is_wider else emulated)(base, cell_directory, cell, rows)
    shutil.rmtree(cell_directory)
    peak = max(stage["peak_rss_bytes"] for stage in measurement["stages"].values())
    seconds = round(time.perf_counter() - started)
    return {**values, "base": digest(base), **measurement, "seconds": seconds, "peak_rss_bytes": peak}


def write_rows(directory: Path, cell: Cell, root: Path) -> dict[str, Path]:
    """Write the rows of a cell, and return their files."""
    if cell.task == PICTURES:
        sets = picture_sets(cell.seed, root)
    else:
        sets = make_sets(cell.task, cell.seed, root, max(SIZES["tuning"], cell.batch * cell.steps))
    if cell.is_wider:
        sets |= {name: sets[name][:size] for name, size in FEWER.items()}
    if cell.forgets:
        sets |= unrelated(root)
    if cell.model == GEMMA:
        sets = {name: list(map(without_chat, rows)) for name, rows in sets.items()}
    files = {name: directory / f"{name}.jsonl" for name in sets}
    for name, rows in sets.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def control(base: Path, directory: Path, cell: Cell, rows: dict[str, Path]) -> dict[str, Any]:
    """Tune the base itself, and measure it."""
    metered = Metered()
    adapter = trained(base, directory / "adapter", cell, rows, metered, exact=cell.kind == SCRATCH)
    scored = Scores(base, rows["test"])
    selection = Scores(base, rows["selection"]).measure(adapter)["nll"]
    systems = {"base": base_scores(scored, directory, cell), cell.kind: scored.measure(adapter)}
    if cell.is_polished and cell.model == DEMO:
        systems["polish20"] = scored.measure(polish_once(cell, adapter, base, rows, metered))
    forgotten = elsewhere(base, rows, {"base": None, cell.kind: adapter}) if cell.forgets else {}
    return {"systems": systems, "selection": selection, **forgotten, "stages": metered.stages}


def elsewhere(base: Path, rows: dict[str, Path], adapters: dict[str, Path | None]) -> dict[str, Any]:
    """Return the loss of the base with these LoRAs on rows that they were not tuned for."""
    scores = {name: Scores(base, rows[name]) for name in UNRELATED}
    return {
        "elsewhere": {
            system: {name: score.measure(adapter)["nll"] for name, score in scores.items()}
            for system, adapter in adapters.items()
        }
    }


def base_scores(scored: Scores, directory: Path, cell: Cell) -> dict[str, Any]:
    """Return the scores of the base alone; wider cells of one model share them, measured once."""
    path = directory.with_name(f"scores-{cell.model}-{cell.task}.json")
    if cell.is_wider and path.exists():
        return json.loads(path.read_text())
    scores = scored.measure(None)
    if cell.is_wider:
        path.write_text(json.dumps(scores), encoding="utf-8")
    return scores


def tuned(
    base: Path, directory: Path, cell: Cell, rows: dict[str, Path], metered: Metered, adapter: Path | None = None
) -> tuple[float, Path, Path]:
    """Make an emulator, and tune a LoRA on it; return the emulator's share of the memory, and both directories.

    The emulator is fitted with the LoRA of ``adapter``, if there is one, which is trained further on it.

    Wider cells of one model share their emulators, which are kept: lengths, ranks and places change the tuning alone.
    """
    from emloc_core.data.rows import load_rows
    from emloc_core.emulator.compress import Compress
    from emloc_core.requests import CompressRequest
    from emloc_core.settings import CompressSettings
    from emloc_core.standins.registry import format_named

    # Kinds are compared by what they make of the Linears.
    options: dict[str, Any] = {"kind": cell.kind, "keep": "head", "seed": cell.seed, "selection": 0}
    options |= VARIANTS.get(cell.kind, {})
    if cell.ratio is not None:
        options["ratio"] = cell.ratio
    options["kind"] = options.pop("factorizer", options["kind"])
    usual = format_named(options["kind"]).samples
    samples = load_rows(str(rows["calibration"]))[: options.get("samples", usual)]
    settings = CompressSettings(**options | {"samples": len(samples)})
    name = f"emulator-{cell.model}-{cell.task}-{cell.kind}-{cell.memory:g}-{cell.seed}"
    emulator = directory.parent / name if cell.is_wider else directory / "emulator"
    request = CompressRequest(model=str(base), output=emulator, data=samples, adapter=adapter, settings=settings)
    compress = Compress(request)
    share = emulator_share(compress)
    metered("compress", compress.run, emulator)
    return share, emulator, trained(emulator, directory / "adapter", cell, rows, metered)


def emulated(base: Path, directory: Path, cell: Cell, rows: dict[str, Path]) -> dict[str, Any]:
    """Make an emulator, tune a LoRA on it, carry it over, take exact steps, and measure it all."""
    from emloc_core.files.manifest import read_manifest

    metered = Metered()
    share, emulator, adapter = tuned(base, directory, cell, rows, metered)
    carried = {
        name: metered(name, partial(corrected, adapter, base, rows, clamp, directory / name))
        for name, clamp in (("paper", 3.0), ("auto", "auto"))
    }
    # Variants say which should be the default, and further seeds how far what the base gets varies: less is enough.
    with_exact = cell.kind not in WITHOUT_EXACT
    in_full = with_exact and cell.seed == 0
    exact_rate, exact = polish(cell, carried["auto"], base, rows, metered) if with_exact else (None, {})
    on_emulator, on_base = Scores(emulator, rows["test"], 64, cell.dtype), Scores(base, rows["test"])
    systems = {"emulator": on_emulator.measure(None), "tuned": on_emulator.measure(adapter)} if in_full else {}
    systems |= {"uncorrected": on_base.measure(adapter), "paper": on_base.measure(carried["paper"])}
    auto = (read_manifest(carried["auto"]) or {})["result"]
    equal_system = {0: "uncorrected", 3: "paper"}.get(auto["clamp"]) if auto.get("scale", 1) == 1 else None
    systems["auto"] = systems[equal_system] if equal_system else on_base.measure(carried["auto"])
    systems |= {name: on_base.measure(path) for name, path in exact.items()}
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


def wider(base: Path, directory: Path, cell: Cell, rows: dict[str, Path]) -> dict[str, Any]:
    """As :func:`emulated`, without the emulator's own loss and the paper's clamp, and with fewer exact steps."""
    from emloc_core.files.manifest import read_manifest

    metered = Metered()
    share, emulator, adapter = tuned(base, directory, cell, rows, metered)
    auto = metered("auto", lambda: corrected(adapter, base, rows, "auto", directory / "auto"), directory / "auto")
    on_base = Scores(base, rows["test"])
    systems = {"uncorrected": on_base.measure(adapter)}
    chosen = (read_manifest(auto) or {})["result"]
    changed = chosen["clamp"] or chosen.get("scale", 1) != 1
    systems["auto"] = on_base.measure(auto) if changed else systems["uncorrected"]
    if cell.is_polished:
        systems["polish20"] = on_base.measure(polish_once(cell, auto, base, rows, metered))
    forgotten = elsewhere(base, rows, {"auto": auto}) if cell.forgets else {}
    return {
        "share": round(share, 4),
        "chosen": {name: chosen[name] for name in chosen if name in ("clamp", "scale")},
        "candidates": chosen["candidates"],
        "systems": systems,
        "divergence": on_base.divergence(Scores(emulator, rows["test"], dtype=cell.dtype)),
        **forgotten,
        "stages": metered.stages,
    }


def in_rounds(base: Path, directory: Path, cell: Cell, rows: dict[str, Path]) -> dict[str, Any]:
    """Tune in rounds, each on an emulator that is fitted with the LoRA of the last one; then as in one."""
    from emloc_core.files.manifest import read_manifest

    stages: dict[str, dict[str, float]] = {}
    auto, (rounds, _) = None, ROUNDS[cell.kind]
    for number in range(rounds):
        metered, own = Metered(), directory / f"round{number}"
        own.mkdir(exist_ok=True)
        # By another seed other rows come first in later rounds, and their emulators have names of their own.
        part = replace(cell, steps=cell.steps // rounds, seed=cell.seed + 1000 * number)
        share, _, adapter = tuned(base, own, part, rows, metered, auto)
        auto = metered("auto", partial(corrected, adapter, base, rows, "auto", own / "auto"), own / "auto")
        stages |= {f"{stage}, round {number + 1}": figures for stage, figures in metered.stages.items()}
    assert auto is not None
    metered = Metered()
    exact_rate, exact = polish(part, auto, base, rows, metered)
    on_base, chosen = Scores(base, rows["test"]), (read_manifest(auto) or {})["result"]
    return {
        "share": round(share, 4),
        "chosen": {name: chosen[name] for name in chosen if name in ("clamp", "scale")},
        "candidates": chosen["candidates"],
        "exact_rate": exact_rate,
        "exact_moments": True,
        "systems": {
            name: on_base.measure(path) for name, path in {"uncorrected": adapter, "auto": auto, **exact}.items()
        },
        "stages": stages | metered.stages,
    }


def baseline(base: Path, directory: Path, cell: Cell, rows: dict[str, Path]) -> dict[str, Any]:
    """Make a baseline's stand-in, tune a LoRA on it, carry it over as it is, take exact steps, and measure it all."""
    from quality_baselines import make, on_the_base

    metered = Metered()
    smaller = metered(
        "compress", lambda: make(cell.kind, cell.memory, base, rows["calibration"], directory / "emulator")
    )
    adapter = trained(directory / "emulator", directory / "adapter", cell, rows, metered)
    carried = on_the_base(adapter, smaller, base, directory / "carried")
    exact_rate, exact = polish(cell, carried, base, rows, metered)
    on_emulator, on_base = Scores(directory / "emulator", rows["test"], 64), Scores(base, rows["test"])
    systems = {"emulator": on_emulator.measure(None), "tuned": on_emulator.measure(adapter)}
    systems |= {name: on_base.measure(path) for name, path in {"uncorrected": carried, **exact}.items()}
    return {
        "share": round(smaller.share, 4),
        "selection": Scores(base, rows["selection"]).measure(carried)["nll"],
        "exact_rate": exact_rate,
        "exact_moments": True,
        "systems": systems,
        "stages": metered.stages,
    }


def known_rows() -> list[dict[str, Any]]:
    """Return the measurements that there are."""
    results = RESULTS / "quality.json"
    return json.loads(results.read_text())["rows"] if results.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("build/quality"), help="for work in progress")
    for name, kind in AXES.items():
        help_text = f"only cells with this {name.replace('_', ' ')}; may be repeated"
        parser.add_argument(f"--{name.replace('_', '-')}", action="append", type=kind, help=help_text)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--minutes", type=float, help="begin no measurement after this time")
    parser.add_argument("--again", action="store_true", help="measure again what is chosen")
    parser.add_argument("--list", action="store_true", help="only list what is chosen")
    options = parser.parse_args()

    def is_chosen(cell: Cell) -> bool:
        filters = ((getattr(options, name), getattr(cell, name)) for name in AXES)
        return all(not values or value in values for values, value in filters)

    root: Path = options.directory
    root.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    rows = known_rows()
    for cell in chain(cells(options.seeds, rows), wider_cells()):
        old = [row for row in rows if Cell.from_row(row) == cell]
        if not is_chosen(cell) or (old and not options.again):
            continue
        if options.list:
            print(cell.name)
            continue
        if time.monotonic() > end:
            break
        print(f"{time.strftime('%H:%M:%S')} {cell.name}", file=sys.stderr, flush=True)
        new = in_process(measure, root, cell.values)
        # A base that is trained on another machine is another one, whose measurements stay. Read again, since another
        # process may measure other tasks; and in place, since the next cells depend on the rates that are best so far.
        rows[:] = [row for row in known_rows() if row not in old or row["base"] != new["base"]] + [new]
        report(rows)
    if rows and not options.list:
        report(known_rows())


if __name__ == "__main__":
    main()
