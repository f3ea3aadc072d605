"""Memory and time of compress at the widths of Llama-3.2-1B and Llama-3.1-8B, with few blocks and random weights.

Memory must not grow with the number of blocks. Time is split among phases, and compared with the time of the arithmetic
that each needs (:func:`arithmetic`) at the speed of a plain matrix product. Calibration is the kind that needs the
least, on the base's activations, on 64 rows of 128 tokens; the vocabulary is full-size.
"""

import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import goal, in_process, markdown, write_results
from phases import PHASES, measured

LENGTH, WORDS = 128, 1000
CASES = [("1B", 2), ("1B", 4), ("1B", 8), ("8B", 1), ("8B", 2)]
PRODUCT = 4096  # rows and columns of the plain product
SHOWN = [phase for phase in PHASES if phase != "emulator forward"]  # which calibration does without


def compress(work: str) -> dict[str, Any]:
    """Make the emulator of ``work``/base."""
    from emloc_core.emulator.compress import Compress
    from emloc_core.requests import CompressRequest
    from emloc_core.settings import CompressSettings

    directory = Path(work)
    settings = CompressSettings(calibration="base", allocator="uniform")
    paths = {"model": str(directory / "base"), "data": str(directory / "rows.jsonl"), "output": directory / "emulator"}
    job = Compress(CompressRequest(**paths, device="cpu", settings=settings))
    ends = []
    with measured(len(job.samples)) as phases:
        job.run(lambda *_: ends.append(time.perf_counter()))
        seconds = phases.lapped()
    tokens = sum(sample.size for sample in job.samples)
    return {
        "seconds": seconds,
        "last_block_seconds": ends[-1] - ends[-2] if len(ends) > 1 else None,
        "tokens": tokens,
        "operations": arithmetic(job.plan.linears, tokens),
    }


def arithmetic(linears: Iterable[Any], tokens: int) -> dict[str, float]:
    """Return the multiplications and additions that each phase needs, W being m x n and k the rank.

    Forward: ``2 m n`` a token in every Linear (attention left out). Grams: half of ``2 n^2`` a token, since they are
    symmetric. Fitting, on the side of size s: ``14/3 s^3`` for all eigenvectors (tridiagonal form, divide and conquer,
    transformation back), ``2 m n k`` for V; from the inputs' side also ``m n^2`` for ``W^T W``, ``4 n^3`` for
    ``R G R^T`` and ``2 m n k`` for U.
    """
    operations: dict[str, float] = defaultdict(float)
    gathered = set()
    for linear in linears:
        m, n, k = linear.out_features, linear.in_features, linear.rank or 0
        side = m if linear.tap == "output" else n
        operations["base forward"] += 2.0 * tokens * m * n
        operations["fitting"] += 14 / 3 * side**3 + 2.0 * m * n * k
        if linear.tap != "output":
            operations["fitting"] += 1.0 * m * n * n + 4.0 * n**3 + 2.0 * m * n * k
        key = linear.path if linear.tap == "output" else tuple(linear.group)
        if key not in gathered:
            operations["Grams"] += 1.0 * tokens * side**2
            gathered.add(key)
    return dict(operations)


def product_speed() -> dict[str, Any]:
    """Return the operations per second of a plain product of two square matrices, the best of five."""
    import torch

    speeds = {}
    for name in ("float32", "bfloat16"):
        matrix = torch.randn(PRODUCT, PRODUCT).to(getattr(torch, name))
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - start)
        speeds[name] = 2 * PRODUCT**3 / best
    return speeds


def prepare(work: str, size: str, blocks: int) -> dict[str, Any]:
    """Write a checkpoint with a tokenizer of numbered words, and rows of equal length."""
    import json

    from checkpoints import BLOCKS_8B, LLAMA_1B, LLAMA_8B, llama, nbytes, write_checkpoint
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base = write_checkpoint(Path(work) / "base", llama(LLAMA_1B if size == "1B" else LLAMA_8B, blocks))
    backend = Tokenizer(models.WordLevel({f"w{word}": word for word in range(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", eos_token="w1").save_pretrained(base.directory)
    draw = random.Random(0)
    rows = [{"text": " ".join(f"w{draw.randrange(WORDS)}" for _ in range(LENGTH - 1))} for _ in range(128)]
    (Path(work) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"bytes": base.nbytes, "whole_8b_bytes": nbytes(llama(LLAMA_8B, BLOCKS_8B))}


def measure(size: str, blocks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        sizes = in_process(prepare, directory, size, blocks)
        run = in_process(compress, directory)
        shutil.rmtree(directory, ignore_errors=True)
        Path(directory).mkdir()
    return {**run, "size": size, "blocks": blocks, "bytes": sizes["bytes"], "whole_8b_bytes": sizes["whole_8b_bytes"]}


def add_shares(row: dict[str, Any], speeds: dict[str, float]) -> None:
    """Add each phase's share of the time, and the fraction of a plain product's speed that it reaches."""
    seconds = row["seconds"]
    total = sum(seconds.values())
    row["shares"] = {phase: duration / total for phase, duration in seconds.items()}
    ideal = {
        phase: count / speeds["bfloat16" if phase == "base forward" else "float32"]
        for phase, count in row["operations"].items()
    }
    row["of_limit"] = {phase: ideal[phase] / seconds[phase] for phase in ideal} | {"whole": sum(ideal.values()) / total}


def cells(row: dict[str, Any]) -> list[str]:
    shares = [
        f"{row['shares'][phase]:.0%}" + (f" ({row['of_limit'][phase]:.2f})" if phase in row["of_limit"] else "")
        for phase in SHOWN
    ]
    total = sum(row["seconds"].values())
    last = row["last_block_seconds"]
    return [f"{row['size']}, {row['blocks']} blocks", f"{row['bytes'] / 1e9:.2f}", f"{row['peak_rss_bytes'] / 1e9:.2f}",
            f"{total:.0f}", f"{last:.0f}" if last else "", *shares, f"{row['of_limit']['whole']:.2f}"]  # fmt: skip


def main() -> None:
    speeds = in_process(product_speed)
    rows = [measure(size, blocks) for size, blocks in CASES]
    for row in rows:
        add_shares(row, speeds)
    peaks = {(row["size"], row["blocks"]): row["peak_rss_bytes"] for row in rows}
    growth = peaks["1B", 8] / peaks["1B", 2] - 1
    share = max(peaks["8B", 1], peaks["8B", 2]) / rows[-1]["whole_8b_bytes"]
    goals = [
        goal("1B: growth of peak RSS from 2 to 8 blocks", "below 0.05", round(growth, 4), growth < 0.05),
        goal("8B: peak RSS over the whole checkpoint of 32 blocks", "below 0.25", round(share, 4), share < 0.25),
    ]
    header = ["widths", "checkpoint, GB", "peak RSS, GB", "seconds", "last block", *SHOWN, "of the limit"]
    text = (
        f"{markdown(header, [cells(row) for row in rows])}\n\n"
        "Shares of the time; in brackets the fraction of the limit: the needed arithmetic at the speed of a plain "
        f"product of {PRODUCT} x {PRODUCT} ({speeds['float32'] / 1e9:.0f} GFLOP/s in fp32, "
        f"{speeds['bfloat16'] / 1e9:.0f} in bf16, which the forward uses), over the seconds taken."
    )
    write_results("scale", "make bench-scale", [*rows, {"product_operations_a_second": speeds}], goals, text)


if __name__ == "__main__":
    main()
