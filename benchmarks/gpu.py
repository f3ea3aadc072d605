"""Speed and memory on one GPU, in sections that each end in minutes and keep their results as they go.

    python benchmarks/gpu.py [SECTION...]

Every section runs in a process of its own. ``--small`` takes tiny shapes and any device, to see that all of it runs.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from checkpoints import LLAMA_8B, llama, write_checkpoint
from harness import RESULTS, in_process, machine, markdown
from torch import nn

from emloc_core.files.documents import write_json

#: The kinds that are compared, with the ratio of their factors.
KINDS: dict[str, float | None] = {
    "nf4": None, "2.7-bit": None, "1.6-bit+repair": 0.23, "low-rank-nf4": 0.45, "low-rank": 0.28,
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GIB = 1 << 30


def card(small: bool) -> list[dict[str, Any]]:
    """What the card gives: products in bf16, its memory, and the bus from pinned and pageable memory."""
    size, nbytes = (256, 1 << 20) if small else (8192, GIB)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    there = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
    pageable = torch.empty(nbytes, dtype=torch.uint8)
    pinned = pageable.pin_memory() if DEVICE == "cuda" else pageable
    return [
        {"what": "bf16, TFLOP/s", "value": 2 * size**3 / seconds(lambda: a @ b) / 1e12},
        {"what": "memory, GB/s", "value": 2 * nbytes / seconds(there.clone) / 1e9},
        {"what": "bus, pinned, GB/s", "value": nbytes / seconds(lambda: there.copy_(pinned, non_blocking=True)) / 1e9},
        {"what": "bus, pageable, GB/s", "value": nbytes / seconds(lambda: there.copy_(pageable)) / 1e9},
    ]


def layers(small: bool) -> list[dict[str, Any]]:
    """Forward and backward of one Linear of every kind: ms, beside bf16, and the bytes that it takes beside its own."""
    shapes = [(160, 64)] if small else [(4096, 14336), (5120, 27648)]
    rows = []
    for m, n in shapes:
        for kind in (None, *KINDS):
            layer = packed(nn.Sequential(nn.Linear(n, m, bias=False, device=DEVICE, dtype=torch.bfloat16)), kind)[0]
            for tokens in (16,) if small else (1024, 4096, 8192):
                x = torch.randn(tokens, n, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

                def both(layer: nn.Module = layer, x: torch.Tensor = x) -> None:
                    layer(x).sum().backward()

                with memory() as used:
                    taken = seconds(both)
                rows.append({"shape": [m, n], "kind": kind or "base", "tokens": tokens, "ms": 1e3 * taken, **used})
    return rows


def step(small: bool) -> list[dict[str, Any]]:
    """A tuning step on an 8B and on its emulators: seconds, and reserved and allocated peaks."""
    import peft
    from transformers import AutoModelForCausalLM

    blocks, lengths = (2, (16,)) if small else (32, (1024, 4096))
    rows = []
    for kind in (None, *KINDS):
        config = llama({**LLAMA_8B, **(SMALL | {"vocab_size": 256} if small else {})}, blocks)
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        packed(model, kind)
        lora = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear")).train()
        lora.gradient_checkpointing_enable({"use_reentrant": False})
        lora.enable_input_require_grads()
        for length in lengths:
            ids = torch.randint(0, config.vocab_size, (1, length), device=DEVICE)

            def once(lora: Any = lora, ids: torch.Tensor = ids) -> None:
                with torch.autocast(DEVICE, torch.bfloat16):
                    lora(input_ids=ids, labels=ids, use_cache=False).loss.backward()

            with memory() as used:
                taken = seconds(once)
            rows.append({"kind": kind or "base", "tokens": length, "seconds": taken, **used})
        del model, lora, once
    return rows


def stage1(small: bool) -> list[dict[str, Any]]:
    """Stage 1 of two blocks of an 8B, 64 rows of 512 tokens, in every kind: seconds per block."""
    from emloc_core.emulator.compress import Compress
    from emloc_core.requests import CompressRequest
    from emloc_core.settings import CompressSettings

    rows = []
    with TemporaryDirectory() as place:
        base, data = checkpoint(Path(place), small, 2)
        for kind, ratio in KINDS.items():
            settings = CompressSettings(kind=kind, ratio=ratio, samples=4 if small else 64, selection=0)
            request = CompressRequest(
                model=str(base), data=str(data), output=Path(place) / kind, settings=settings, device=DEVICE
            )
            ends = [time.perf_counter()]
            with memory() as used:
                Compress(request).run(lambda *_, ends=ends: ends.append(time.perf_counter()))
            rows.append({"kind": kind, "seconds_per_block": ends[-1] - ends[-2], **used})
    return rows


def exact(small: bool) -> list[dict[str, Any]]:
    """Exact steps on eight blocks of an 8B: seconds, what was read per second, and the share spent waiting."""
    from emloc_core.exact.lora import lora_on
    from emloc_core.exact.steps import ExactSteps
    from emloc_core.model.opened import open_model
    from emloc_core.settings import TrainSettings
    from emloc_core.tuning.trl import lora_config

    rows = []
    with TemporaryDirectory() as place:
        model = open_model(str(checkpoint(Path(place), small, 2 if small else 8)[0]), DEVICE)
        lora: Any = lora_on(model.skeleton, lora_config(TrainSettings(), model.family.lora_targets())).train()
        steps = ExactSteps(lora.get_base_model(), model.skeleton, torch.device(DEVICE))
        ids = [torch.randint(200, (1, 16 if small else 1024)) for _ in range(4)]
        batches = [{"input_ids": each, "labels": each} for each in ids]
        for number in range(3):
            before = steps.weights.bytes_read, steps.weights.waited, time.perf_counter()
            steps.loss(batches, autocast=True)
            taken = time.perf_counter() - before[2]
            read = steps.weights.bytes_read - before[0]
            waited = (steps.weights.waited - before[1]) / taken
            rows.append({"step": number, "seconds": taken, "read_gb_per_second": read / taken / 1e9, "waiting": waited})
        steps.close()
    return rows


SECTIONS: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    section.__name__: section for section in (card, layers, step, stage1, exact)
}


def packed(model: nn.Module, kind: str | None) -> nn.Module:
    """Replace all Linears but the head by layers of a kind, with random codes: time is the same."""
    from emloc_core.algorithms.allocation import uniform
    from emloc_core.standins.registry import format_named

    if kind is None:
        return model
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {path: tuple(module.weight.shape) for path, module in linears.items() if path != "lm_head"}
    ratio = KINDS[kind]
    ranks = uniform(list(shapes.values()), ratio) if ratio else [None] * len(shapes)
    format_named(kind).replace(model, dict(zip(shapes, ranks, strict=True)))
    for path in shapes:
        for parameter in model.get_submodule(path).parameters():
            if parameter.dtype == torch.uint8:
                parameter.data.random_(0, 6**3)  # a code of three numbers on six levels, or of five on three
            else:
                parameter.data.fill_(0.01)
    return model


def checkpoint(place: Path, small: bool, blocks: int) -> tuple[Path, Path]:
    """Write a base of an 8B's widths with random weights, a tokenizer of its words, and rows."""
    from emloc_demo.model import write_base

    write_base(place / "words")
    base = place / "base"
    shape = {**LLAMA_8B, **(SMALL if small else {}), "vocab_size": 49152}
    write_checkpoint(base, llama(shape, blocks))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (place / "words" / file).exists():
            (base / file).write_bytes((place / "words" / file).read_bytes())
    words = ["the", "model", "that", "does", "not", "fit", "is", "tuned", "in", "the", "memory"]
    length = 16 if small else 512
    texts = [" ".join(words[(row + at * (row + 3)) % len(words)] for at in range(length)) for row in range(80)]
    (place / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return base, place / "rows.jsonl"


def seconds(work: Callable[[], Any], runs: int = 5) -> float:
    """Return the least time of a few runs, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        wait()
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def wait() -> None:
    """Wait until the GPU is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@contextmanager
def memory() -> Iterator[dict[str, float]]:
    """Fill the dict with what the block allocates at most beside what is there, and what is reserved in all, in GB."""
    used: dict[str, float] = {}
    if DEVICE != "cuda":
        yield used
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield used
    used["allocated_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    used["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9


def run(section: str, small: bool) -> dict[str, Any]:
    """Run one section, in a process of its own."""
    return {"rows": SECTIONS[section](small)}


def main() -> None:
    """Run the sections that are asked for, and write each one's result when it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}.  [default: all]")
    parser.add_argument("--small", action="store_true", help="Take tiny shapes.")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json", help="Where results are kept.")
    given = parser.parse_args()
    if DEVICE != "cuda" and not given.small:
        sys.exit("There is no GPU. Give --small to see that everything runs.")
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    for section in given.sections or SECTIONS:
        rows = in_process(run, section, given.small)["rows"]
        found[section] = {"machine": machine(), "rows": rows}
        write_json(given.out, found)
        print(f"\n{section}\n\n{markdown(list(rows[0]), [[shown(value) for value in row.values()] for row in rows])}")


def shown(value: Any) -> Any:
    """Return a number with three digits, and anything else as it is."""
    return float(f"{value:.3g}") if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
