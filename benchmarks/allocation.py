"""Loss of untuned emulators of equal size by how their ranks are allocated: SmolLM2-135M on the demo's messages.

Per seed (of the draw of calibration rows) the model is decomposed once, on its own activations. The first k of the best
factors are the best of rank k, so every ratio and allocator is cut from that decomposition.
Beside `uniform` and `global`, `energies` is `global` with every sensitivity 1: what the spectra alone are worth. The
loss is the mean NLL per token of the right answers of held-out messages, whose names, items, numbers and wordings stand
in no calibration row. Factors are multiplied in fp32 and the forward is in bf16, the dtype of the published SmolLM2.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from emloc_demo.data import write_data
from emloc_demo.model import write_base
from harness import goal, in_process, markdown, write_results
from loss import nll
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from emloc_core.algorithms.allocation import Spectrum, largest_rank
from emloc_core.algorithms.factorize import Factors
from emloc_core.data.rows import load_rows
from emloc_core.data.tokenize import encode
from emloc_core.emulator.compress import Compress
from emloc_core.emulator.decompose import Decomposition
from emloc_core.emulator.ranks import LinearPlan, RankPlan, allocated
from emloc_core.emulator.sensitivity import PROBES
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.requests import CompressRequest
from emloc_core.settings import CompressSettings
from emloc_core.standins import LowRank

ALLOCATORS = ("uniform", "energies", "global")


def measure(directory: str, seed: int, ratios: list[float], rows: int) -> dict[str, Any]:
    """Decompose with one draw of calibration rows, and measure every ratio and allocator."""
    root = Path(directory)
    base = Checkpoint(root / "base")
    paths = {"model": str(base.directory), "data": str(root / "data" / "train.jsonl")}
    settings = CompressSettings(kind="low-rank", calibration="base", allocator="uniform", seed=seed)
    job = Compress(CompressRequest(**paths, output=root / f"emulator-{seed}", settings=settings))
    linears, store = job.method.linears, FactorStore()
    largest = {linear.path: largest_rank(linear.out_features, linear.in_features) for linear in linears.candidates}
    arguments = (linears.with_ranks(largest), job.samples, LowRank(), lambda *_: None)
    Decomposition(job.base.skeleton, *arguments).run(store, PROBES)
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.bfloat16).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(base.directory)
    held_out = encode(load_rows(str(root / "data" / "test.jsonl"))[:rows], tokenizer)
    results: list[dict[str, Any]] = []

    def record(ratio: float, allocator: str, parameters: float) -> None:
        entry = {"seed": seed, "ratio": ratio, "allocator": allocator, "parameters": parameters}
        results.append({**entry, "nll": nll(model, held_out)})
        print(results[-1], file=sys.stderr, flush=True)

    record(1.0, "base", 1.0)
    for ratio in ratios:
        for name, spectrum in zip(ALLOCATORS, (None, store.alike, store.spectrum), strict=True):
            plan = allocated(linears, ratio, spectrum)
            emulate(model, store, plan)
            before, after = plan.parameters(LowRank())
            record(ratio, name, after / before)
    return {"results": results}


class FactorStore:
    """The factors of all Linears at the largest useful ranks, in memory, as a decomposition stores them."""

    def __init__(self) -> None:
        self.factors: dict[str, Factors] = {}
        self._sensitivities: dict[str, float] = {}

    def is_written(self, _block: str) -> bool:
        """Say that a block is still to be done."""
        return False

    def write(self, _block: str, fitted: Mapping[str, tuple[Factors, float]]) -> None:
        """Keep a block's factors."""
        for path, (factors, sensitivity) in fitted.items():
            self.factors[path], self._sensitivities[path] = factors, sensitivity

    def spectrum(self, linear: LinearPlan) -> Spectrum:
        """Return a Linear's spectrum, for an allocator."""
        energies = self.factors[linear.path].spectrum
        return Spectrum(linear.path, linear.block, energies, self._sensitivities[linear.path])

    def alike(self, linear: LinearPlan) -> Spectrum:
        """Return a Linear's spectrum as if all Linears disturbed their blocks alike."""
        return replace(self.spectrum(linear), sensitivity=1.0)


def emulate(model: PreTrainedModel, store: FactorStore, plan: RankPlan) -> None:
    """Replace every planned Linear's weight with the product of its factors: it answers as in the emulator."""
    for linear in plan.linears:
        if linear.rank is not None:
            u, v = (getattr(store.factors[linear.path], name) for name in ("u", "v"))
            model.get_parameter(f"{linear.path}.weight").data.copy_(u[:, : linear.rank] @ v[: linear.rank])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("build/allocation"), help="kept between runs")
    parser.add_argument("--rows", type=int, default=128, help="held-out messages")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4, 0.6, 0.8])
    options = parser.parse_args()
    root: Path = options.directory
    if not (root / "base").exists():
        write_base(root / "base")
    write_data(root / "data")
    rows = [
        row
        for seed in range(options.seeds)
        for row in in_process(measure, root, seed, options.ratios, options.rows)["results"]
    ]
    report(rows, options.rows)


def report(rows: list[dict[str, Any]], messages: int) -> None:
    """Write the results: a line for every ratio and seed."""
    by_case = {(row["ratio"], row["seed"], row["allocator"]): row for row in rows}
    cases = sorted({key[:2] for key in by_case if key[2] == "global"})

    def column(value: str, name: str) -> list[float]:
        return [by_case[*case, name][value] for case in cases]

    losses = [column("nll", name) for name in ALLOCATORS]
    rows_of_losses = zip(*losses, strict=True)
    lines = [[*case, *(f"{loss:.3f}" for loss in row)] for case, row in zip(cases, rows_of_losses, strict=True)]
    table = markdown(["ratio", "seed", *ALLOCATORS], lines)
    base = next(row["nll"] for row in rows if row["allocator"] == "base")
    text = f"NLL per token on {messages} held-out messages, untuned; the base has {base:.3f}.\n\n{table}"

    def worst(value: str) -> float:
        return max(ours - even for ours, even in zip(column(value, "global"), column(value, "uniform"), strict=True))

    goals = [
        goal("NLL of global minus uniform, the worst case", "below 0", round(worst("nll"), 4), worst("nll") < 0),
        goal(
            "parameters of global minus uniform, the worst case",
            "at most 0",
            worst("parameters"),
            worst("parameters") <= 0,
        ),
    ]
    write_results("allocation", "make bench-allocation", rows, goals, text)


if __name__ == "__main__":
    main()
