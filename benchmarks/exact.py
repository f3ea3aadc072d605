"""Exact steps: their memory at the widths of Llama-3.1-8B, and their time beside TRL's step on a model that fits.

Memory must not grow with the number of blocks but by the activations at their boundaries. On SmolLM2-135M, the same
rows go through TRL's own trainer with accumulation and through exact steps, with the activations at boundaries in
memory and on disk, in turn, in processes of their own; the files are in the system's cache. The first step is left out:
it reads nothing ahead.
"""

import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness import goal, in_process, markdown, resident_bytes, write_results

BLOCKS, TOKENS = (2, 4, 8), (2, 64)  # of the 8B shape; micro-batches, tokens of each
MICRO_BATCHES, LENGTH, STEPS = (4, 16), 256, 4
ORDINARY, EXACT, PARKED = WAYS = ("ordinary", "exact", "exact, parked on disk")


def wide_step(work: str, blocks: int) -> dict[str, Any]:
    """Take one exact step on ``blocks`` blocks of the 8B shape."""
    import torch
    from checkpoints import LLAMA_8B, llama, write_checkpoint

    from emloc_core.exact.lora import lora_on
    from emloc_core.exact.steps import ExactSteps
    from emloc_core.model.opened import open_model
    from emloc_core.settings import TrainSettings
    from emloc_core.tuning.trl import lora_config

    directory = Path(work) / f"8B-{blocks}"
    if not directory.exists():
        write_checkpoint(directory, llama(LLAMA_8B, blocks))
        return {}
    model = open_model(str(directory), "cpu")
    imported = resident_bytes()
    lora: Any = lora_on(model.skeleton, lora_config(TrainSettings(), model.family.lora_targets())).train()
    steps = ExactSteps(lora.get_base_model(), model.skeleton)
    ids = [torch.randint(128000, (1, TOKENS[1])) for _ in range(TOKENS[0])]
    started = time.perf_counter()
    steps.loss([{"input_ids": batch, "labels": batch} for batch in ids])
    seconds = time.perf_counter() - started
    reads = steps.weights.reads
    return {
        "blocks": blocks,
        "checkpoint_bytes": model.checkpoint.nbytes,
        "imported_bytes": imported,
        "lora_bytes": sum(8 * p.numel() for p in lora.parameters() if p.requires_grad),  # with gradients, fp32
        "boundary_bytes": TOKENS[0] * TOKENS[1] * 4096 * 2 * (blocks + 2),
        "seconds": seconds,
        "reads_per_block": sum(count for unit, count in reads.items() if ".layers." in unit) / blocks,
        "waited_seconds": steps.weights.waited,
    }


def tune(work: str, micro_batches: int, way: str) -> dict[str, Any]:
    """Train SmolLM2 for some steps; return what each took."""
    from transformers import TrainerCallback

    from emloc_core.requests import TrainRequest
    from emloc_core.settings import ExactSettings, TrainSettings
    from emloc_core.tuning.exact import prepare
    from emloc_core.tuning.trainer import LoraTrainer

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    initialise = LoraTrainer.__init__

    def clocked(self: Any, *args: Any, **options: Any) -> None:
        initialise(self, *args, **options)
        self.add_callback(Clock())

    LoraTrainer.__init__ = clocked  # type: ignore[method-assign]
    settings = TrainSettings(steps=STEPS, batch_size=1, accumulation=micro_batches, max_length=LENGTH, logging_steps=1)
    directory = Path(work)
    arguments: Any = {"model": str(directory / "smollm2"), "data": str(directory / "rows.jsonl"), "settings": settings}
    if way != ORDINARY:
        arguments |= {"exact": True, "limits": ExactSettings(park="disk" if way == PARKED else "memory")}
    adapter = prepare(TrainRequest(output=directory / f"{micro_batches}-{way}", **arguments)).run()
    timing = json.loads((adapter / "timing.json").read_text())
    seconds = [end - start for start, end in zip(marks[::2], marks[1::2], strict=True)]
    losses = [entry["loss"] for entry in json.loads((adapter / "log.json").read_text())]
    return {
        "micro_batches": micro_batches,
        "way": way,
        "step_seconds": statistics.median(seconds[1:]),
        "losses": losses,
        "read_bytes": timing.get("read_bytes", 0),
        "waited_seconds": timing.get("waited_seconds", 0.0),
    }


def prepare(work: str) -> dict[str, Any]:
    """Write SmolLM2 in bf16, and rows of text of at least :data:`LENGTH` tokens."""
    import torch
    from emloc_demo.data import make_rows
    from emloc_demo.model import write_base
    from transformers import AutoModelForCausalLM

    directory = Path(work)
    write_base(directory / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(directory / "smollm2", dtype=torch.bfloat16)
    model.save_pretrained(directory / "smollm2")
    messages = [row["messages"][0]["content"] for row in make_rows()[0]]
    rows = [{"text": " ".join(messages[start : start + 8])} for start in range(0, len(messages), 8)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}


def main() -> None:
    """Measure, and write the results."""
    wide, narrow = [], []
    with tempfile.TemporaryDirectory() as work:
        for blocks in BLOCKS:
            in_process(wide_step, work, blocks)  # writes the checkpoint
            wide.append(in_process(wide_step, work, blocks))
        in_process(prepare, work)
        for count in MICRO_BATCHES:
            narrow += [in_process(tune, work, count, way) for way in WAYS]
    peak = max(row["peak_rss_bytes"] for row in wide)
    growth = [
        (b["peak_rss_bytes"] - a["peak_rss_bytes"])
        - sum(b[term] - a[term] for term in ("lora_bytes", "boundary_bytes"))
        for a, b in pairwise(wide)
    ]
    nbytes = wide[0]["checkpoint_bytes"] + 30 * (wide[1]["checkpoint_bytes"] - wide[0]["checkpoint_bytes"]) / 2
    by_way = {(row["way"], row["micro_batches"]): row for row in narrow}

    def beside_trl(way: str, key: str) -> list[float]:
        return [round(by_way[way, count][key] / by_way[ORDINARY, count][key], 3) for count in MICRO_BATCHES]

    times = {way: beside_trl(way, "step_seconds") for way in (EXACT, PARKED)}
    peaks = {way: beside_trl(way, "peak_rss_bytes") for way in (EXACT, PARKED)}
    counts = " and ".join(map(str, MICRO_BATCHES))
    goals = [
        goal("growth per doubling besides boundaries and LoRA (GB)", 0.1, round(max(growth) / 1e9, 3),
             max(growth) < 1e8),
        goal("peak over the checkpoint of 32 blocks", 0.25, round(peak / nbytes, 3), peak / nbytes <= 0.25),
        goal("reads per block and step", 2, wide[-1]["reads_per_block"], wide[-1]["reads_per_block"] == 2),
        *(goal(f"step time over TRL's, {way}, {counts} micro-batches", 1.1, ratios, max(ratios) <= 1.1)
          for way, ratios in times.items()),
        *(goal(f"peak over TRL's, {way}, {counts} micro-batches", 1, ratios, max(ratios) < 1)
          for way, ratios in peaks.items()),
    ]  # fmt: skip
    table = markdown(
        ["8B-shaped blocks", "checkpoint GB", "peak RSS GB", "step s", "reads per block", "waited s"],
        [
            [row["blocks"], *(round(row[key] / 1e9, 2) for key in ("checkpoint_bytes", "peak_rss_bytes")),
             round(row["seconds"], 1), row["reads_per_block"], round(row["waited_seconds"], 2)]
            for row in wide
        ],
    )  # fmt: skip
    table += "\n\n" + markdown(
        ["SmolLM2, micro-batches", "way", "step s", "peak RSS GB", "weights read GB", "waited s"],
        [
            [row["micro_batches"], row["way"], round(row["step_seconds"], 2), round(row["peak_rss_bytes"] / 1e9, 2),
             round(row["read_bytes"] / 1e9, 2), round(row["waited_seconds"], 2)]
            for row in narrow
        ],
    )  # fmt: skip
    write_results("exact", "make bench-exact", [*wide, *narrow], goals, table)


if __name__ == "__main__":
    main()
