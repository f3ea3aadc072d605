"""Processor time of a tuning step on emulators of every kind, beside the same step on the base.

A LoRA of rank 8 on all Linears of the blocks, with gradient checkpointing, under autocast to bf16, on one thread.
Weights and codes are random: time does not depend on them. The head is a few tokens wide, so that blocks are compared.
A step is forward and backward; kinds take turns, and the least counts, since other work on a machine slows all of them.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from checkpoints import LLAMA_1B, llama
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
#: Ratio of the factors by kind, at the sizes that are recommended.
KINDS = {"nf4": None, "2.7-bit": None, "1.6-bit+repair": 0.23, "low-rank-nf4": 0.45, "low-rank": 0.28}
RUNS, LENGTH, VOCABULARY = 3, 256, 512
GOAL = 1.05


def model(shape: dict[str, Any], blocks: int, kind: str | None) -> torch.nn.Module:
    """Return a model of this shape in bf16, or an emulator of it, with a LoRA, ready to be tuned."""
    import peft
    from transformers import AutoModelForCausalLM

    from emloc_core.algorithms.allocation import uniform
    from emloc_core.standins.registry import format_named

    config = llama({**shape, "vocab_size": VOCABULARY}, blocks)
    found = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linears = {
        name: module
        for name, module in found.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    if kind == "nf4":
        in_four_bits(found, linears)
    elif kind:
        ratio, shapes = KINDS[kind], [(module.out_features, module.in_features) for module in linears.values()]
        ranks = uniform(shapes, ratio) if ratio else [None] * len(shapes)
        format_named(kind).replace(found, dict(zip(linears, ranks, strict=True)))
        for name in linears:
            for parameter in found.get_submodule(name).parameters():
                if parameter.dtype == torch.uint8:
                    parameter.data.random_(0, 6**3)  # a code of three numbers on six levels, or of five on three
                else:
                    parameter.data.fill_(0.01)
    found = peft.get_peft_model(found, peft.LoraConfig(r=8, target_modules="all-linear"))
    found.gradient_checkpointing_enable({"use_reentrant": False})
    found.enable_input_require_grads()
    return found.train()


def in_four_bits(model: torch.nn.Module, linears: Mapping[str, torch.nn.Linear]) -> None:
    """Put bitsandbytes' own layers in, as transformers does where it loads an emulator in four bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in linears.items():
        packed = Linear4bit(linear.in_features, linear.out_features, False, torch.bfloat16, True, "nf4")
        packed.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=packed).to("cpu")
        model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # what PEFT asks


def seconds(name: str) -> dict[str, Any]:
    """Return the least processor time of a step on the base and on every kind, which take turns."""
    torch.set_num_threads(1)
    shape, blocks, rows = SHAPES[name]
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH))
    models = {kind: model(shape, blocks, kind) for kind in (None, *KINDS)}

    def step(kind: str | None) -> float:
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = models[kind](input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return time.process_time() - began

    for kind in models:
        step(kind)  # the first one also sets up the libraries
    least = dict.fromkeys(models, float("inf"))
    for _ in range(RUNS):
        least = {kind: min(best, step(kind)) for kind, best in least.items()}
    return {"seconds": {kind or "base": best for kind, best in least.items()}}


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
    write_results("step", "make bench-step", rows, goals, table)


if __name__ == "__main__":
    main()
