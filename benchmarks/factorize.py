"""Time and error of the factorisation on the Linears of a Llama-3.1-8B block, beside the textbook method.

The textbook: eigendecomposition of the inputs' Gram for its root S, SVD of ``W S``, explicit inverse of S. A stronger
peer replaces root and inverse by Cholesky (with the smallest jitter that succeeds) and a triangular solve. Both may
share what depends on the input alone among the Linears of an input group. All in one process, in fp32, with the Grams
given; errors are measured in fp64 on the inputs themselves. `--full` for the widths of the 8B model; half by default.

Weights and activations are random. The activations' spectra follow those of SmolLM2-135M's inputs: the middle blocks',
and the first block's, which are so steep that fp32 shows.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import goal, in_process, markdown, write_results

from emloc_core.algorithms.factorize import factorize
from emloc_core.algorithms.statistics import Gram, cheaper_side

RATIO = 0.6
CHUNK = 2048  # tokens

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Widths of a block, and a number of calibration tokens above the widest."""

    hidden: int
    kv: int
    intermediate: int
    tokens: int

    def groups(self) -> dict[str, dict[str, int]]:
        """Linears that share an input -> their numbers of outputs."""
        hidden, kv, intermediate = self.hidden, self.kv, self.intermediate
        return {
            "attention": {"q_proj": hidden, "k_proj": kv, "v_proj": kv},
            "output": {"o_proj": hidden},
            "mlp": {"gate_proj": intermediate, "up_proj": intermediate},
            "down": {"down_proj": hidden},
        }


PEERS = ("textbook", "cholesky")
#: How fast the energy falls: direction i of n has ``exp(-decay i / n) / i``.
SPECTRA = {"middle": 3.0, "first": 12.0}
HALF, FULL = Shape(2048, 512, 7168, 8192), Shape(4096, 1024, 14336, 16384)


def hidden_states(tokens: int, width: int, decay: float, generator: torch.Generator) -> torch.Tensor:
    """Return normalised hidden states, (tokens, width), fp32.

    Directions mixed at random, with energies that fall as in :data:`SPECTRA`; a common mean that has as much energy as
    all of them; four channels ten times as large as the others; one token in 256 that is almost nothing but two
    channels; then RMS normalisation, as a Linear's input has.
    """
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    index = torch.arange(1, width + 1)
    states = (
        torch.randn(tokens, width, generator=generator) * ((-decay * index / width).exp() / index).sqrt()
    ) @ mixing
    states += states.std() * torch.randn(width, generator=generator)
    states[:, torch.randperm(width, generator=generator)[:4]] *= 10
    states[::256, torch.randperm(width, generator=generator)[:2]] += 1000 * states.std()
    return states / states.square().mean(1, keepdim=True).sqrt()


def weight(out_features: int, in_features: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=generator) / in_features**0.5


def gram(side: Any, activations: torch.Tensor) -> Gram:
    sums = Gram(side, activations.shape[1], torch.float32)
    for chunk in activations.split(CHUNK):
        sums.add(chunk)
    return sums


class Textbook:
    """Whitening by the root of the Gram, and back by its inverse."""

    def __init__(self, matrix: torch.Tensor) -> None:
        energies, vectors = torch.linalg.eigh(matrix)
        floor = energies[-1] * torch.finfo(matrix.dtype).eps  # what fp32 cannot tell from 0
        self.root = vectors * energies.clamp(min=floor).sqrt()
        self.inverse = torch.linalg.inv(self.root)

    def factors(self, weight: torch.Tensor, rank: int) -> Pair:
        """Return U, V of shapes (m, rank), (rank, n)."""
        u, s, vh = torch.linalg.svd(weight @ self.root, full_matrices=False)
        return u[:, :rank] * s[:rank], vh[:rank] @ self.inverse


class Cholesky:
    """Whitening by a Cholesky factor, and back by a triangular solve."""

    def __init__(self, matrix: torch.Tensor) -> None:
        jitter = 0.0
        while True:
            shifted = matrix + jitter * matrix.diagonal().mean() * torch.eye(len(matrix))
            self.root, failed = torch.linalg.cholesky_ex(shifted)
            if not failed:
                break
            jitter = max(10 * jitter, 1e-8)

    def factors(self, weight: torch.Tensor, rank: int) -> Pair:
        """Return U, V of shapes (m, rank), (rank, n)."""
        u, s, vh = torch.linalg.svd(weight @ self.root, full_matrices=False)
        return u[:, :rank] * s[:rank], torch.linalg.solve_triangular(self.root, vh[:rank], upper=False, left=False)


def relative_error(weight: torch.Tensor, pair: Pair, inputs: torch.Tensor) -> float:
    """Return ``||(W - U V) X|| / ||W X||`` in fp64."""
    weight, u, v = (tensor.double() for tensor in (weight, *pair))
    error = total = 0.0
    for chunk in inputs.split(CHUNK):
        rows = chunk.double()
        outputs = rows @ weight.T
        total += float(outputs.square().sum())
        error += float((outputs - (rows @ v.T) @ u.T).square().sum())
    return (error / total) ** 0.5


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    value = work()
    return value, time.perf_counter() - start


def measure_group(inputs: torch.Tensor, weights: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Factorise the Linears of one input group in every way.

    A peer's seconds are of its own SVD; ``shared`` are the seconds of what it does once per group.
    """
    source = gram("input", inputs)
    grams = {
        name: source if cheaper_side(*weight.shape) == "input" else gram("output", inputs @ weight.T)
        for name, weight in weights.items()
    }
    ours = {name: timed(partial(factorize, weight, grams[name], rank(weight))) for name, weight in weights.items()}
    textbook, textbook_shared = timed(lambda: Textbook(source.matrix))
    cholesky, cholesky_shared = timed(lambda: Cholesky(source.matrix))
    rows = []
    for name, weight in weights.items():
        factors, seconds = ours[name]
        row: dict[str, Any] = {"linear": name, "shape": list(weight.shape), "rank": rank(weight), "ours": {
            "seconds": seconds, "error": relative_error(weight, (factors.u, factors.v), inputs)}}  # fmt: skip
        for peer, method, shared in (("textbook", textbook, textbook_shared), ("cholesky", cholesky, cholesky_shared)):
            pair, seconds = timed(partial(method.factors, weight, rank(weight)))
            row[peer] = {"seconds": seconds, "shared": shared, "error": relative_error(weight, pair, inputs)}
        rows.append({**row, "group": len(weights)})
        print(f"{name} done", file=sys.stderr, flush=True)
    return rows


def rank(weight: torch.Tensor) -> int:
    m, n = weight.shape
    return int(RATIO * m * n / (m + n))


def warm_up() -> None:
    """Let the libraries load and start their threads before anything is timed."""
    small = gram("input", torch.randn(512, 128))
    matrix = torch.randn(256, 128)
    factorize(matrix, small, 16)
    Textbook(small.matrix).factors(matrix, 16)
    Cholesky(small.matrix).factors(matrix, 16)


def block_inputs(shape: Shape, decay: float, generator: torch.Generator) -> Any:
    """Yield the inputs and the weights of every input group, one group in memory at a time."""
    for name, linears in shape.groups().items():
        states = hidden_states(shape.tokens, shape.hidden, decay, generator)
        if name == "down":  # its input is computed by gate and up from hidden states
            gate, up = (weight(shape.intermediate, shape.hidden, generator) for _ in range(2))
            states = torch.nn.functional.silu(states @ gate.T) * (states @ up.T)
        yield states, {path: weight(size, states.shape[1], generator) for path, size in linears.items()}


def measure(full: bool, spectra: list[str]) -> dict[str, Any]:
    """Measure all Linears of a block for each spectrum, one after the other in this process."""
    warm_up()
    rows = []
    for spectrum in spectra:
        generator = torch.Generator().manual_seed(0)
        for inputs, weights in block_inputs(FULL if full else HALF, SPECTRA[spectrum], generator):
            rows += [{"activations": spectrum, **row} for row in measure_group(inputs, weights)]
    return {"rows": rows}


def totals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of each method for all Linears of a block; a peer's with and without sharing in a group."""
    seconds = {"ours": sum(row["ours"]["seconds"] for row in rows)}
    for peer in PEERS:
        seconds[peer] = sum(row[peer]["seconds"] + row[peer]["shared"] / row["group"] for row in rows)
        seconds[f"{peer}, nothing shared"] = sum(row[peer]["seconds"] + row[peer]["shared"] for row in rows)
    return seconds


def cells(row: dict[str, Any]) -> list[Any]:
    ours = row["ours"]
    times = [(row[peer]["seconds"] + row[peer]["shared"] / row["group"]) / ours["seconds"] for peer in PEERS]
    errors = [ours["error"] / row[peer]["error"] for peer in PEERS]
    return [row["activations"], row["linear"], " x ".join(map(str, row["shape"])), row["rank"],
            f"{ours['seconds']:.2f} s", *(f"{ratio:.1f}" for ratio in times),
            f"{ours['error']:.5f}", *(f"{ratio:.5f}" for ratio in errors)]  # fmt: skip


def report(rows: list[dict[str, Any]], name: str) -> None:
    header = ["activations", "Linear", "shape", "rank", "ours", "textbook takes, times", "Cholesky takes, times",
              "our error", "over textbook's", "over Cholesky's"]  # fmt: skip
    text, goals, sums = markdown(header, [cells(row) for row in rows]), [], []
    for spectrum in dict.fromkeys(row["activations"] for row in rows):
        selected = [row for row in rows if row["activations"] == spectrum]
        seconds = totals(selected)
        times = {method: duration / seconds["ours"] for method, duration in seconds.items()}
        worst = max(row["ours"]["error"] / row["textbook"]["error"] for row in selected)
        summary = "; ".join(f"{method} {duration:.1f} s ({times[method]:.1f})" for method, duration in seconds.items())
        text += f"\n\nA block in total, activations of the {spectrum} kind: {summary}."
        sums.append({"activations": spectrum, "linear": "all", "seconds": seconds, "times_ours": times})
        goals += [
            goal(f"{spectrum}: seconds of the textbook method, sharing within input groups, over ours", "at least 10",
                 round(times["textbook"], 2), times["textbook"] >= 10),
            goal(f"{spectrum}: largest error of a Linear over the textbook's", "at most 1.0005", round(worst, 6),
                 worst <= 1.0005),
        ]  # fmt: skip
    write_results(name, f"make bench-{name}", [*rows, *sums], goals, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the widths of Llama-3.1-8B itself, not half of them")
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA))
    arguments = parser.parse_args()
    rows = in_process(measure, arguments.full, arguments.spectra)["rows"]
    name = "factorize-full" if arguments.full else "factorize"
    report(rows, name)


if __name__ == "__main__":
    main()
