"""Loss of the base with the LoRA tuned on each kind of emulator: SmolLM2-135M on the demo's messages.

What is used in the end is the base with the LoRA, so that is what decides which calibration and which allocator are the
defaults. Every seed is another draw of calibration rows, other initial values of the LoRA and another order of tuning
rows; the tuning is the demo's. The loss is the mean NLL per token of the right answers of held-out messages, whose
names, items, numbers and wordings occur in no other row; it is computed in bf16, the dtype of the published SmolLM2.
Stages that are finished in `--directory` are not repeated.
"""

import argparse
import itertools
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from emloc_demo.data import write_data
from emloc_demo.model import write_base
from harness import goal, in_process, markdown, write_results

#: Kind, calibration and allocator of the emulators. The first are the defaults.
KINDS = (
    ("low-rank", "base", "uniform"),
    ("low-rank", "propagated", "uniform"),
    ("low-rank", "base", "global"),
    ("low-rank-nf4", "propagated", "uniform"),
    ("nf4", "", ""),
)
#: What is measured of each, by its name in the table.
LOSSES = {"emulator": "emulator, untuned", "tuned": "emulator, tuned", "transferred": "base with that LoRA"}
TUNING = {"steps": 40, "learning_rate": 5e-4, "gradient_checkpointing": False, "logging_steps": 1}


def measure(
    directory: str, kind: str, calibration: str, allocator: str, seed: int, ratio: float, rows: int
) -> dict[str, Any]:
    """Make an emulator, tune a LoRA on it, carry it over, and measure the loss of each on held-out rows."""
    import torch
    from loss import nll
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import emloc_core.lowrank  # noqa: F401 - emulators load from here on
    from emloc_core.adapters.adapter import Adapter
    from emloc_core.adapters.correct import Correct
    from emloc_core.data.rows import load_rows
    from emloc_core.data.tokenize import encode
    from emloc_core.emulator.compress import Compress
    from emloc_core.files.checkpoint import Checkpoint
    from emloc_core.files.documents import read_json
    from emloc_core.files.output import TIMING, read_manifest
    from emloc_core.settings import CompressSettings, CorrectSettings, TrainSettings
    from emloc_core.tuning.train import Train

    root = Path(directory)
    base, train = Checkpoint(root / "base"), str(root / "data" / "train.jsonl")
    place = root / f"{kind}-{calibration}-{allocator}-{ratio:g}-{seed}"
    place.mkdir(exist_ok=True)
    ranks = {"ratio": ratio, "allocator": allocator, "calibration": calibration} if calibration else {}
    settings = CompressSettings(kind=kind, seed=seed, **ranks)
    emulator = Compress(base, load_rows(train), place / "emulator", settings).run()
    adapter = Train(emulator, train, place / "adapter", TrainSettings(seed=seed, **TUNING)).run()
    corrected = Correct(Adapter(adapter), base, place / "corrected", CorrectSettings()).run()
    held_out = encode(
        load_rows(str(root / "data" / "test.jsonl"))[:rows], AutoTokenizer.from_pretrained(base.directory)
    )

    def loss(model: Path, lora: Path | None = None) -> float:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        return nll(PeftModel.from_pretrained(loaded, lora) if lora else loaded, held_out)

    manifest = read_manifest(emulator) or {}
    return {
        "kind": kind,
        "bytes": manifest["result"]["bytes"],
        "calibration": calibration,
        "allocator": allocator,
        "seed": seed,
        "seconds": read_json(emulator / TIMING)["seconds"],
        "clamp": (read_manifest(corrected) or {})["result"]["clamp"],
        "emulator": loss(emulator),
        "tuned": loss(emulator, adapter),
        "transferred": loss(base.directory, corrected),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("build/emulators"), help="kept between runs")
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--rows", type=int, default=200, help="held-out messages")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    root: Path = options.directory
    if not (root / "base").exists():
        write_base(root / "base")
    write_data(root / "data")
    rows = []
    for seed, kind in itertools.product(range(options.seeds), KINDS):
        rows.append(in_process(measure, root, *kind, seed, options.ratio, options.rows))
        print(rows[-1], file=sys.stderr, flush=True)
    report(rows, options.ratio, options.rows)


def report(rows: list[dict[str, Any]], ratio: float, messages: int) -> None:
    """Write the results: a line for every kind, and how it does beside the default in every seed."""
    found = {
        kind: [row for row in rows if (row["kind"], row["calibration"], row["allocator"]) == kind] for kind in KINDS
    }
    default = [row["transferred"] for row in found[KINDS[0]]]
    lines, goals = [], []
    for kind, of in found.items():
        losses = [spread([row[name] for row in of]) for name in LOSSES]
        gains = [ours - theirs for ours, theirs in zip([row["transferred"] for row in of], default, strict=True)]
        beside = "" if kind == KINDS[0] else spread(gains, signed=True)
        lines.append([*kind, *losses, beside, f"{mean(row['seconds'] for row in of):.0f}"])
        if kind != KINDS[0]:
            goals.append(goal(f"base with its LoRA, {' '.join(kind).strip()} minus the default, mean", "at least 0",
                              round(mean(gains), 4), mean(gains) >= 0))  # fmt: skip
    header = ["kind", "calibration", "allocator", *LOSSES.values(), "minus the default's", "seconds to make"]
    text = (
        f"NLL per token on {messages} held-out messages at ratio {ratio:g}: mean and standard deviation of "
        f"{len(default)} seeds.\n\n{markdown(header, lines)}"
    )
    write_results("emulators", "make bench-emulators", rows, goals, text)


def spread(values: list[float], *, signed: bool = False) -> str:
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):{'+' if signed else ''}.3f}{deviation}"


if __name__ == "__main__":
    main()
