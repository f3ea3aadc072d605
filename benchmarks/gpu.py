"""Speed and memory on one GPU, in sections that each end in minutes and keep their results as they go.

    python benchmarks/gpu.py [SECTION...]

Every section runs in a process of its own. ``--small`` takes tiny shapes and any device, to see that all of it runs.
"""

import argparse
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights
from checkpoints import LLAMA_8B, llama, write_checkpoint
from harness import RESULTS, in_process, machine, markdown
from phases import measured
from torch import nn

from emloc_core.files.documents import write_json

#: The kinds that are compared, with the ratio of their factors.
KINDS: dict[str, float | None] = {
    "nf4": None, "trellis": None, "low-rank-nf4": 0.45,
    "low-rank-2-bit": 0.54, "low-rank": 0.28,
}  # fmt: skip
#: What others train LoRAs on.
OTHER = "bitsandbytes"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
#: The language model of InternVL2.5-38B, which is Qwen2.5-32B but for the name of its class and biases.
SHAPE_38B = {**LLAMA_8B, "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648,
             "num_attention_heads": 40}  # fmt: skip
GIB = 1 << 30


def card(small: bool) -> list[dict[str, Any]]:
    """What the card gives: products in bf16, its memory, and the bus from pinned and pageable memory."""
    size, nbytes = (256, 1 << 20) if small else (8192, GIB)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    buffer = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
    pageable = torch.empty(nbytes, dtype=torch.uint8)
    pinned = pageable.pin_memory() if DEVICE == "cuda" else pageable
    return [
        {"what": "bf16, TFLOP/s", "value": 2 * size**3 / seconds(lambda: a @ b) / 1e12},
        {"what": "memory, GB/s", "value": 2 * nbytes / seconds(buffer.clone) / 1e9},
        {"what": "bus, pinned, GB/s", "value": nbytes / seconds(lambda: buffer.copy_(pinned, non_blocking=True)) / 1e9},
        {"what": "bus, pageable, GB/s", "value": nbytes / seconds(lambda: buffer.copy_(pageable)) / 1e9},
    ]


def layers(small: bool) -> list[dict[str, Any]]:
    """Forward and backward of one Linear of every kind: ms, bytes beside its own, and waits of the CPU for the GPU."""
    shapes = [(160, 64)] if small else [(4096, 14336), (5120, 27648)]
    rows = []
    for m, n in shapes:
        for kind in (None, OTHER, *KINDS):
            linear = nn.Linear(n, m, bias=False, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
            layer = packed(nn.Sequential(linear), kind).get_submodule("0")
            for tokens in (16,) if small else (1024, 4096, 8192):
                x = torch.randn(tokens, n, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

                def forward_and_backward(layer: nn.Module = layer, x: torch.Tensor = x) -> None:
                    layer(x).sum().backward()

                with memory() as used:
                    elapsed = seconds(forward_and_backward)
                entry: dict[str, Any] = {"shape": [m, n], "kind": kind or "base", "tokens": tokens}
                rows.append({**entry, "ms": 1e3 * elapsed, "waits": waits(forward_and_backward), **used})
    return rows


def step(small: bool) -> list[dict[str, Any]]:
    """A tuning step on an 8B, on bitsandbytes' and on its emulators: seconds, waits, peaks reserved and allocated."""
    blocks, lengths = (2, (16,)) if small else (32, (1024, 4096))
    return [
        row
        for kind in (None, OTHER, *KINDS)
        for row in tuned({**LLAMA_8B, **(SMALL if small else {})}, blocks, kind, lengths)
    ]


def capped(small: bool) -> list[dict[str, Any]]:
    """A tuning step on emulators of the shape of a 38B where a process may take 24 GiB of the GPU."""
    from emloc_core.model.cap import cap_gpus

    cap_gpus(24 * GIB)
    shape, blocks, length = ({**SHAPE_38B, **SMALL}, 2, 16) if small else (SHAPE_38B, 64, 1024)
    return [row for kind in ("nf4", "trellis") for row in tuned(shape, blocks, kind, (length,))]


def stage1(small: bool) -> list[dict[str, Any]]:
    """Stage 1 of two blocks of an 8B, 64 rows of 512 tokens, in every kind: seconds of the last, by phase."""
    from emloc_core.emulator.compress import Compress
    from emloc_core.requests import CompressRequest
    from emloc_core.settings import CompressSettings

    rows = []
    with TemporaryDirectory() as directory:
        base, data = checkpoint(Path(directory), LLAMA_8B, 2, small=small)
        for kind, ratio in KINDS.items():
            settings = CompressSettings(kind=kind, ratio=ratio, samples=4 if small else 64, selection=0)
            request = CompressRequest(
                model=str(base), data=str(data), output=Path(directory) / kind, settings=settings, device=DEVICE
            )
            rows.append({"kind": kind, **block_seconds(Compress(request))})
    return rows


def exact(small: bool) -> list[dict[str, Any]]:
    """Exact steps on blocks of an 8B and of a 38B: seconds, what was read per second, and the share spent waiting."""
    from emloc_core.exact.lora import lora_on
    from emloc_core.exact.steps import ExactSteps
    from emloc_core.model.opened import open_model
    from emloc_core.settings import TrainSettings
    from emloc_core.tuning.trl import lora_config

    rows = []
    for name, shape, blocks in (("8B", LLAMA_8B, 8), ("38B", SHAPE_38B, 16)):
        with TemporaryDirectory() as directory, memory() as used:
            base, _ = checkpoint(Path(directory), shape, 2 if small else blocks, small=small)
            model = open_model(str(base), "cpu")  # which reads; the steps are taken on the GPU
            lora: Any = lora_on(model.skeleton, lora_config(TrainSettings(), model.family.lora_targets()), DEVICE)
            steps = ExactSteps(lora.train().get_base_model(), model.skeleton, torch.device(DEVICE))
            ids = [torch.randint(200, (1, 16 if small else 1024)) for _ in range(4)]
            batches = [{"input_ids": batch, "labels": batch} for batch in ids]
            for number in range(3):
                before = steps.weights.bytes_read, steps.weights.waited, time.perf_counter()
                steps.loss(batches, autocast=True)
                wait()
                elapsed = time.perf_counter() - before[2]
                read_rate = (steps.weights.bytes_read - before[0]) / elapsed / 1e9
                waited = (steps.weights.waited - before[1]) / elapsed
                entry: dict[str, Any] = {"shape": name, "blocks": blocks, "step": number, "seconds": elapsed}
                rows.append({**entry, "read_gb_per_second": read_rate, "waiting": waited})
            steps.close()
        rows = [{**row, **used} if row["shape"] == name else row for row in rows]
    return rows


SECTIONS: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    section.__name__: section for section in (card, layers, step, capped, stage1, exact)
}


def block_seconds(job: Any) -> dict[str, float]:
    """Run stage 1; return the seconds of the last block, in all and by phase, and what the GPU held."""
    blocks: list[dict[str, float]] = []
    with memory() as used, measured(len(job.samples), wait) as phases:
        job.run(lambda *_: blocks.append(phases.lapped()))
    return {"seconds_per_block": sum(blocks[-1].values()), **blocks[-1], **used}


def tuned(shape: dict[str, Any], blocks: int, kind: str | None, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measure steps of a LoRA on a model of a shape, whose Linears are of a kind, with one row of every length."""
    import peft
    from transformers import AutoModelForCausalLM

    from emloc_core.compat.peft import leave_casts_to_autocast

    rows = []
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(llama(shape, blocks), dtype=torch.bfloat16)
    with memory() as used:  # from the weights on
        materialise(packed(model, kind))
        model.is_loaded_in_4bit = kind == OTHER  # PEFT reads this
        lora = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear")).train()
        lora.gradient_checkpointing_enable({"use_reentrant": False})
        lora.enable_input_require_grads()
        leave_casts_to_autocast(lora)
        for length in lengths:
            ids = torch.randint(0, shape["vocab_size"], (1, length), device=DEVICE)

            def training_step(ids: torch.Tensor = ids) -> None:
                with torch.autocast(DEVICE, torch.bfloat16):
                    lora(input_ids=ids, labels=ids, use_cache=False).loss.backward()

            elapsed = seconds(training_step)
            rows.append({"kind": kind or "base", "tokens": length, "seconds": elapsed, "waits": waits(training_step)})
    return [{**row, **used} for row in rows]


def materialise(model: nn.Module) -> None:
    """Move parameters from the meta device to the device, with any numbers: they do not change the time."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty_like(parameter, device=DEVICE)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
                fill(values)
    model.to(DEVICE)


def fill(parameter: torch.Tensor) -> None:
    """Fill a parameter with small numbers, or with codes of three numbers on six levels, or of five on three."""
    if parameter.dtype == torch.uint8:
        parameter.random_(0, 6**3)
    else:
        parameter.fill_(0.01)


def packed(model: nn.Module, kind: str | None) -> nn.Module:
    """Replace all Linears but the head by layers of a kind, with random codes."""
    from emloc_core.algorithms.allocation import uniform
    from emloc_core.standins.registry import format_named

    if kind is None:
        return model
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {path: (module.out_features, module.in_features) for path, module in linears.items() if path != "lm_head"}
    if kind == OTHER:
        from bitsandbytes.nn import Linear4bit

        for path, (m, n) in shapes.items():
            layer = Linear4bit(n, m, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device=DEVICE)
            layer = layer.to(torch.bfloat16).to(DEVICE)  # as models are: it unpacks to the dtype that it packed
            model.set_submodule(path, layer.requires_grad_(requires_grad=False))
        return model
    ratio = KINDS[kind]
    ranks: list[int | None] = [*uniform(list(shapes.values()), ratio)] if ratio else [None] * len(shapes)
    format_named(kind).replace(model, dict(zip(shapes, ranks, strict=True)))
    for path in shapes:
        for parameter in model.get_submodule(path).parameters():
            if not parameter.is_meta:
                fill(parameter.data)
    return model


def checkpoint(directory: Path, shape: dict[str, Any], blocks: int, *, small: bool) -> tuple[Path, Path]:
    """Write a base of a shape with random weights, whose words are numbers, and rows, in which no two are alike."""
    from emloc_core.conformance.inputs import number_tokenizer

    config = llama({**shape, **(SMALL if small else {"vocab_size": 49152})}, blocks)
    write_checkpoint(directory / "base", config)
    number_tokenizer(config).save_pretrained(directory / "base")
    draw, length = random.Random(0), 16 if small else 512
    texts = [" ".join(str(draw.randrange(9, 200)) for _ in range(length - 1)) for _ in range(80)]
    (directory / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return directory / "base", directory / "rows.jsonl"


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


def waits(work: Callable[[], Any]) -> int:
    """Return how often the CPU waits for the GPU in work that has run before."""
    if DEVICE != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


@contextmanager
def memory() -> Iterator[dict[str, float]]:
    """Fill the dict, in GB, with the peak that the block allocates beyond what was there, and with all reserved."""
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
    """Run the requested sections, and write each result as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}.  [default: all]")
    parser.add_argument("--small", action="store_true", help="Take tiny shapes.")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json", help="Where results are kept.")
    options = parser.parse_args()
    if DEVICE != "cuda" and not options.small:
        sys.exit("There is no GPU. Give --small to see that everything runs.")
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    failed = []
    for section in options.sections or SECTIONS:
        try:
            rows = in_process(run, section, options.small)["rows"]
        except SystemExit as error:  # the next one may be worth its minutes
            failed.append(str(error))
            continue
        results[section] = {"machine": machine(), "rows": rows}
        write_json(options.out, results)
        print(f"\n{section}\n\n{markdown(list(rows[0]), [[rounded(value) for value in row.values()] for row in rows])}")
    if failed:
        sys.exit("\n".join(failed))


def rounded(value: Any) -> Any:
    """Return a number with three digits, and anything else as it is."""
    return float(f"{value:.3g}") if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
