"""Time and memory of correct and merge at Llama-3.1-8B's widths, beside copying the files and beside PEFT's merge.

The checkpoint has random weights, two blocks, and the embedding and head of the whole model: 3 GB in five shards. Each
measurement is a process of its own, without its imports; the time of a copy or merge ends when all is on the disk
(but PEFT's when it has been handed to the system).
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from harness import goal, in_process, markdown, resident_bytes, write_results

BLOCKS, RANK, RATIO, CLAMP = 2, 16, 0.6, 3
RUNS = 3  # the median counts


def prepare(work: str) -> dict[str, Any]:
    from checkpoints import LLAMA_8B, llama, write_checkpoint, write_emulator, write_lora

    directory = Path(work)
    base = write_checkpoint(directory / "base", llama(LLAMA_8B, BLOCKS))
    emulator = write_emulator(directory / "emulator", base, RATIO)
    write_lora(directory / "adapter", base, emulator.directory, RANK)
    sizes = [tensor.nbytes for key, tensor in base.tensors.items() if "layers" in key]
    largest = max(tensor.nbytes for tensor in base.tensors.values())
    return {"bytes": base.nbytes, "largest": largest, "largest_with_lora": max(sizes), "with_lora": sum(sizes)}


def correct(work: str) -> dict[str, Any]:
    from emloc_core.adapters.correct import prepare
    from emloc_core.requests import CorrectRequest
    from emloc_core.settings import CorrectSettings

    directory, floor, start = Path(work), _floor(), time.perf_counter()
    arguments = {"adapter": directory / "adapter", "base": str(directory / "base"), "output": directory / "corrected"}
    prepare(CorrectRequest(**arguments, device="cpu", settings=CorrectSettings(clamp=CLAMP))).run()
    return {"seconds": time.perf_counter() - start, "floor_bytes": floor}


def merge(work: str) -> dict[str, Any]:
    from emloc_core.adapters.merge import Merge
    from emloc_core.requests import MergeRequest

    directory, floor, start = Path(work), _floor(), time.perf_counter()
    arguments = {"adapter": directory / "corrected", "base": str(directory / "base"), "output": directory / "merged"}
    Merge(MergeRequest(**arguments)).run()
    return {"seconds": time.perf_counter() - start, "floor_bytes": floor}


def peft_merge(work: str) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory, floor, start = Path(work), _floor(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype="auto")
    PeftModel.from_pretrained(model, directory / "corrected").merge_and_unload().save_pretrained(directory / "peft")
    return {"seconds": time.perf_counter() - start, "floor_bytes": floor}


def compare(work: str) -> dict[str, Any]:
    """Compare our merged tensors with PEFT's, and with the base's."""
    import torch

    from emloc_core.files.checkpoint import Checkpoint

    ours, theirs, base = (Checkpoint(Path(work) / name) for name in ("merged", "peft", "base"))
    assert ours.tensors.keys() == theirs.tensors.keys() == base.tensors.keys()
    counts = {"tensors": len(ours.tensors), "equal_to_peft": 0, "unchanged": 0}
    largest = 0.0
    for key in ours.tensors:
        with ours.slices([key]) as a, theirs.slices([key]) as b, base.slices([key]) as c:
            merged, expected, before = (slices[key][...] for slices in (a, b, c))
            counts["equal_to_peft"] += torch.equal(merged, expected)
            counts["unchanged"] += torch.equal(merged, before)
            largest = max(largest, float((merged - expected).abs().max()))
    return {**counts, "largest_difference": largest}


def copy(work: Path) -> float:
    """Return the seconds that `cp` takes with the files of the base, until all is on the disk."""
    from subprocess import run

    start = time.perf_counter()
    run(["cp", "-r", work / "base", work / "copy"], check=True)
    for path in (work / "copy").iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def _floor() -> int:
    """Return the memory that the process has before it starts, with what it will need of the libraries loaded."""
    from transformers.models.llama import modeling_llama  # noqa: F401

    return resident_bytes()


def cached(work: Path) -> None:
    for path in (work / "base").iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(64 << 20):
                pass


def evicted(work: Path) -> None:
    os.sync()
    for path in (work / "base").iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fresh(work: Path, name: str, state: Callable[[Path], None]) -> None:
    """Remove an output of the run before, let the disk finish, and put the base's files in or out of the cache."""
    shutil.rmtree(work / name, ignore_errors=True)
    os.sync()
    state(work)


def measure(work: Path) -> list[dict[str, Any]]:
    """Return a row a measurement: what, seconds of every run, and memory where it is ours to measure."""
    rows = [{"what": "correct, clamp 3", "runs": [in_process(correct, work)]}]
    (work / ".emloc-hashes.json").unlink()
    fresh(work, "merged", cached)
    rows.append({"what": "merge, the base to be hashed first", "runs": [in_process(merge, work)]})
    for state, name in ((cached, "files cached"), (evicted, "files not cached")):
        copies, merges = [], []
        for _ in range(RUNS):  # in turns, so that what else the machine does falls on both
            fresh(work, "copy", state)
            copies.append({"seconds": copy(work)})
            fresh(work, "merged", state)
            merges.append(in_process(merge, work))
        rows += [{"what": f"cp, {name}", "runs": copies}, {"what": f"merge, {name}", "runs": merges}]
    shutil.rmtree(work / "copy")
    fresh(work, "peft", cached)
    rows.append({"what": "PEFT's merge_and_unload, files cached", "runs": [in_process(peft_merge, work)]})
    for row in rows:
        row["seconds"] = median(run["seconds"] for run in row["runs"])
        if "floor_bytes" in row["runs"][0]:
            row["above_imports_bytes"] = max(run["peak_rss_bytes"] - run["floor_bytes"] for run in row["runs"])
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        sizes = in_process(prepare, work)
        rows = measure(work)
        difference = in_process(compare, work)
    by_name = {row["what"]: row for row in rows}

    def shares(command: str, reference: str) -> float:
        return by_name[reference]["seconds"] / by_name[command]["seconds"]

    goals = [
        goal(f"{name}: peak above imports, in largest tensors ({sizes['largest'] / 1e9:.2f} GB)", "at most 3",
             round(by_name[what]["above_imports_bytes"] / sizes["largest"], 3),
             by_name[what]["above_imports_bytes"] <= 3 * sizes["largest"])
        for name, what in (("correct", "correct, clamp 3"), ("merge", "merge, files cached"))
    ]  # fmt: skip
    for state in ("files cached", "files not cached"):
        share = shares(f"merge, {state}", f"cp, {state}")
        goals.append(
            goal(f"merge: share of the throughput of cp, {state}", "at least 0.5", round(share, 3), share >= 0.5)
        )
    table = [
        [row["what"], f"{row['seconds']:.1f}",
         f"{(sizes['with_lora'] if row['what'].startswith('correct') else sizes['bytes']) / row['seconds'] / 1e6:.0f}",
         f"{row['above_imports_bytes'] / 1e6:.0f}" if "above_imports_bytes" in row else ""]
        for row in rows
    ]  # fmt: skip
    text = (
        f"{markdown(['what', 'seconds', 'MB/s', 'peak above imports, MB'], table)}\n\n"
        f"Medians of {RUNS} runs where files are copied. A checkpoint of {sizes['bytes'] / 1e9:.2f} GB, of which "
        f"{sizes['with_lora'] / 1e9:.2f} GB in Linears with a LoRA, the largest of these "
        f"{sizes['largest_with_lora'] / 1e6:.0f} MB. {difference['equal_to_peft']} of {difference['tensors']} merged "
        f"tensors equal PEFT's bit for bit (largest difference {difference['largest_difference']:.1e}); "
        f"{difference['unchanged']} are the base's."
    )
    rows += [{"what": "sizes", **sizes}, {"what": "comparison with PEFT", **difference}]
    write_results("stages", "make bench-stages", rows, goals, text)


if __name__ == "__main__":
    main()
