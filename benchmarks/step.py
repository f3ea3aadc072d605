"""Processor time of a tuning step on emulators of every kind, beside the base's, and beside single precision.

A LoRA of rank 8 on all Linears of the blocks, with gradient checkpointing, under autocast to bf16, on one thread.
Weights and codes are random: time does not depend on them. The head is a few tokens wide, so that blocks are compared.
A step is forward and backward; kinds take turns, and the least counts, since other work on a machine slows all of them.

Then the same steps, and others, beside themselves with everything in single precision: held to AVX2, where no processor
multiplies bfloat16 fast; and with a base in fp16 and no autocast, as the machine is.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import torch
from checkpoints import LLAMA_1B, llama
from gpu import KINDS, packed
from harness import goal, in_process, markdown, write_results

SMOLLM2 = {
    **LLAMA_1B,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
#: Widths, blocks, and rows of 256 tokens per step.
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "SmolLM2-135M, 1,024 tokens": (SMOLLM2, 6, 4),
    "Llama-3.2-1B, 2,048 tokens": (LLAMA_1B, 1, 8),
}
RUNS, LENGTH, VOCABULARY = 3, 256, 512
GOAL = 1.05
#: Makes any processor with AVX2 one that has nothing else, for torch and for oneDNN.
HELD = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
#: How much longer than in single precision a step may take, by what it is a step of.
IN_SINGLE = {"nf4": 1.15, "trellis": 1.25, "low-rank-nf4": 1.25, "LoRA": 1.25, "images": 1.25, "experts": 1.25,
             "exact": 1.25}  # fmt: skip
BLOCKS, ROWS, IMAGE, PATCH = 3, 4, 224, 14

Step = Callable[[], torch.Tensor]


def model(shape: dict[str, Any], blocks: int, kind: str | None, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """Return a model of this shape, or an emulator of it, with a LoRA, ready to be tuned."""
    from transformers import AutoModelForCausalLM

    config = llama({**shape, "vocab_size": VOCABULARY}, blocks)
    return with_lora(packed(AutoModelForCausalLM.from_config(config, dtype=dtype), kind))


def with_lora(network: torch.nn.Module) -> torch.nn.Module:
    """Return a model with a LoRA on all Linears, ready to be tuned."""
    import peft

    network = peft.get_peft_model(network, peft.LoraConfig(r=8, target_modules="all-linear"))
    network.gradient_checkpointing_enable({"use_reentrant": False})
    network.enable_input_require_grads()
    return network.train()


def seconds(name: str) -> dict[str, Any]:
    """Return the least processor time of a step on the base and on every kind, which take turns."""
    torch.set_num_threads(1)
    shape, blocks, rows = SHAPES[name]
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH))
    models = {kind: model(shape, blocks, kind) for kind in (None, *KINDS)}

    def step(kind: str | None) -> float:
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = models[kind](input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return time.process_time() - started

    for kind in models:
        step(kind)  # the first one also sets up the libraries
    least = dict.fromkeys(models, float("inf"))
    for _ in range(RUNS):
        least = {kind: min(best, step(kind)) for kind, best in least.items()}
    return {"seconds": {kind or "base": best for kind, best in least.items()}}


def step_of(case: str, dtype: torch.dtype, work: str) -> Step:
    """Return what computes the loss of a step, whose backward pass is not taken."""
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH))
    if case == "images":
        return images(ids, dtype)
    if case == "exact":
        return exact(ids, dtype, work)
    network = experts(dtype) if case == "experts" else model(SMOLLM2, BLOCKS, None if case == "LoRA" else case, dtype)
    return lambda: network(input_ids=ids, labels=ids, use_cache=False).loss


def images(ids: torch.Tensor, dtype: torch.dtype) -> Step:
    """Return a step of an image-text model, InternVL, with an image per row."""
    from transformers import AutoModelForImageTextToText, InternVLConfig, InternVLVisionConfig

    vision = InternVLVisionConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6, num_hidden_layers=4,
                                  image_size=IMAGE, patch_size=PATCH)  # fmt: skip
    text = llama({**SMOLLM2, "vocab_size": VOCABULARY}, BLOCKS)
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=0, downsample_ratio=0.5)
    network = with_lora(AutoModelForImageTextToText.from_config(config, dtype=dtype))
    ids[:, : (IMAGE // PATCH // 2) ** 2] = 0
    pixels = torch.randn(len(ids), 3, IMAGE, IMAGE, dtype=dtype)
    return lambda: network(input_ids=ids, labels=ids, pixel_values=pixels, use_cache=False).loss


def experts(dtype: torch.dtype) -> torch.nn.Module:
    """Return a mixture of four experts, of which two are active, with a LoRA on its attention."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                           num_key_value_heads=3, num_local_experts=4, num_hidden_layers=BLOCKS)  # fmt: skip
    return with_lora(AutoModelForCausalLM.from_config(config, dtype=dtype))


def exact(ids: torch.Tensor, dtype: torch.dtype, work: str) -> Step:
    """Return an exact step, forward and backward, of a checkpoint that is written to ``work``."""
    from transformers import AutoModelForCausalLM

    from emloc_core.exact.lora import lora_on
    from emloc_core.exact.steps import ExactSteps
    from emloc_core.model.opened import open_model
    from emloc_core.settings import TrainSettings
    from emloc_core.tuning.trl import lora_config

    directory = f"{work}/{dtype}"
    config = llama({**SMOLLM2, "vocab_size": VOCABULARY}, BLOCKS)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(directory)
    opened = open_model(directory, "cpu")
    lora: Any = lora_on(opened.skeleton, lora_config(TrainSettings(), opened.family.lora_targets())).train()
    steps = ExactSteps(lora.get_base_model(), opened.skeleton)
    batch = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    return lambda: torch.tensor(float(steps.loss(batch)))  # it has been backward


def beside_single(case: str, half: str) -> dict[str, Any]:
    """Return how much longer a step in a half precision takes than the same in single precision; they take turns."""
    from emloc_core.compat import halves

    torch.set_num_threads(1)
    halves.serve(getattr(torch, half))
    least: dict[torch.dtype, float] = {}
    with TemporaryDirectory() as work:
        steps = {dtype: step_of(case, dtype, work) for dtype in (getattr(torch, half), torch.float32)}
        for _ in range(1 + RUNS):
            for dtype, step in steps.items():
                started = time.process_time()
                # As in stage 2; fp16 is what --no-bf16 leaves.
                autocast = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
                with autocast:
                    loss = step()
                if loss.requires_grad:
                    loss.backward()
                least[dtype] = min(least.get(dtype, float("inf")), time.process_time() - started)
    half_seconds, single_seconds = least.values()
    return {"half": half_seconds, "single": single_seconds}


def in_single() -> list[dict[str, Any]]:
    """Return a row for every case of :data:`IN_SINGLE`: a step's time over that in single precision, both ways."""
    ways = {"bfloat16, held to AVX2": ("bfloat16", HELD), "fp16, as the machine is": ("float16", {})}
    rows = []
    for case in IN_SINGLE:
        measured = {
            way: in_process(beside_single, case, half, env={"OMP_NUM_THREADS": "1", **held})
            for way, (half, held) in ways.items()
        }
        rows.append({"step": case, **{way: round(row["half"] / row["single"], 3) for way, row in measured.items()}})
    return rows


def main() -> None:
    rows = []
    for name in SHAPES:
        least = in_process(seconds, name, env={"OMP_NUM_THREADS": "1"})["seconds"]
        rows.append({"shape": name, **{kind: round(value / least["base"], 3) for kind, value in least.items()}})
    worst = {kind: max(row[kind] for row in rows) for kind in KINDS}
    goals = [
        goal(f"a step on `{kind}` / on the base", f"at most {GOAL}", value, value <= GOAL)
        for kind, value in worst.items()
    ]
    table = markdown(["shape", "base", *KINDS], [list(row.values()) for row in rows])
    besides = in_single()
    goals += [
        goal(f"a step of `{row['step']}` in {way} / in single precision", f"at most {IN_SINGLE[row['step']]}",
             row[way], row[way] <= IN_SINGLE[row["step"]])
        for row in besides for way in list(row)[1:]
    ]  # fmt: skip
    table += "\n\nBeside the same step with everything in single precision:\n\n"
    table += markdown(list(besides[0]), [list(row.values()) for row in besides])
    write_results("step", "make bench-step", [*rows, *besides], goals, table)


if __name__ == "__main__":
    main()
