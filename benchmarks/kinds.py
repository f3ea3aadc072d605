"""Costs of stage 1 for every kind of emulator: processor time, and peak memory beside the plan of ``emloc plan``.

Four blocks of SmolLM2-135M in fp32 on the demo's rows, of 142 tokens, and a block each at the widths of Llama-3.2-1B
and Llama-3.1-8B with random weights, on rows of 128 tokens; one thread. Output layer and embeddings stay as they are,
so that blocks alone count. Each emulator is made in a process of its own, whose peak is measured. The plan is a
formula, not a trace: it should not promise less than the peak.

``make bench-kinds`` resumes: what was measured is kept in ``build/kinds``, which ``make clean`` removes.
``python benchmarks/kinds.py SmolLM2`` measures and shows one size.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import goal, in_process, markdown, write_results
from scale import LENGTH, prepare

#: Size -> blocks, and calibration rows.
SIZES = {"SmolLM2": (4, 64), "1B": (1, 64), "8B": (1, 16)}
#: Name -> settings of the emulator.
WAYS: dict[str, dict[str, Any]] = {
    "nf4": {"kind": "nf4"},
    "trellis": {"kind": "trellis"},
    "low-rank-nf4": {"kind": "low-rank-nf4"},
    "low-rank-2-bit": {"kind": "low-rank-2-bit"},
    "low-rank": {"kind": "low-rank"},
    "low-rank, paper": {"kind": "low-rank", "calibration": "base", "allocator": "uniform"},
}
CACHE = Path(__file__).parents[1] / "build" / "kinds"


def smollm2(work: str, blocks: int) -> dict[str, Any]:
    """Write the first blocks of SmolLM2-135M, and the demo's rows."""
    import torch
    from emloc_demo.data import make_rows
    from emloc_demo.model import write_base
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = Path(work)
    source = write_base(directory / "whole")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:blocks], blocks
    model.save_pretrained(directory / "base")
    AutoTokenizer.from_pretrained(source).save_pretrained(directory / "base")
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()[0]), encoding="utf-8")
    return {}


def compress(work: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Make an emulator of ``work``/base; return the processor seconds of all blocks, and the mean error of a Linear."""
    from emloc_core.emulator.compress import Compress
    from emloc_core.requests import CompressRequest
    from emloc_core.settings import CompressSettings

    directory = Path(work)
    with tempfile.TemporaryDirectory(dir=directory) as output:
        arguments = {"model": str(directory / "base"), "data": str(directory / "rows.jsonl"), "device": "cpu"}
        compress_settings = CompressSettings(**settings)
        job = Compress(CompressRequest(**arguments, output=Path(output) / "emulator", settings=compress_settings))
        job.output  # noqa: B018 - hashes the base
        started = time.process_time()
        job.run()
        seconds = time.process_time() - started
    errors = [linear["relative_error"] for linear in job.output.result["linears"]]
    return {"processor_seconds": seconds, "mean_error": sum(errors) / len(errors)}


def planned(work: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the bytes that ``emloc plan`` says this takes."""
    from emloc_core.memory import streamed
    from emloc_core.memory.model import MemoryModel
    from emloc_core.memory.workload import make_workload
    from emloc_core.settings import CompressSettings, TrainSettings

    config = Path(work) / "base" / "config.json"
    model = MemoryModel(
        config, make_workload(config, TrainSettings(batch_size=1), length=LENGTH), CompressSettings(**settings)
    )
    return {"planned_bytes": streamed.compress(model, model.plan()).total}


def measure(size: str) -> list[dict[str, Any]]:
    """Measure every kind at a size, except those that an earlier run measured."""
    blocks, samples = SIZES[size]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name, settings in WAYS.items():
            cache = CACHE / f"{size}-{name}.json"
            if not cache.exists():
                if not (Path(directory) / "base").exists():
                    in_process(smollm2, directory, blocks) if size == "SmolLM2" else in_process(
                        prepare, directory, size, blocks
                    )
                case = {**settings, "samples": samples, "keep": "head"}
                plan = in_process(planned, directory, case)
                measured = in_process(compress, directory, case, env={"OMP_NUM_THREADS": "1"})
                row = {"size": size, "blocks": blocks, "name": name, "settings": case, **plan, **measured}
                cache.parent.mkdir(parents=True, exist_ok=True)
                cache.write_text(json.dumps(row), encoding="utf-8")
                print(json.dumps(row), file=sys.stderr)
            rows.append(json.loads(cache.read_text(encoding="utf-8")))
    return rows


def main() -> None:
    rows = [row for size in sys.argv[1:] or SIZES for row in measure(size)]
    table = markdown(
        [
            "widths of",
            "blocks",
            "kind",
            "processor s",
            "a block",
            "mean error",
            "peak, GB",
            "planned, GB",
            "planned / peak",
        ],
        [
            [
                row["size"],
                row["blocks"],
                row["name"],
                round(row["processor_seconds"], 1),
                round(row["processor_seconds"] / row["blocks"], 1),
                f"{row['mean_error']:.5f}",
                f"{row['peak_rss_bytes'] / 1e9:.2f}",
                f"{row['planned_bytes'] / 1e9:.2f}",
                f"{row['planned_bytes'] / row['peak_rss_bytes']:.2f}",
            ]
            for row in rows
        ],
    )
    if sys.argv[1:]:
        print(table)
        return
    least = min(row["planned_bytes"] / row["peak_rss_bytes"] for row in rows)
    write_results(
        "kinds",
        "make bench-kinds",
        rows,
        [goal("plan over peak, the least", "at least 0.95", round(least, 3), least >= 0.95)],
        table,
    )


if __name__ == "__main__":
    main()
