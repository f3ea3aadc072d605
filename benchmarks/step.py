"""Processor time of a tuning step on emulators of every kind, beside the same step on the base.

A LoRA of rank 8 on all Linears of the blocks, with gradient checkpointing, under autocast to bf16, on one thread.
Weights and codes are random: time does not depend on them. The head is a few tokens wide, so that blocks are compared.
A step is forward and backward; kinds take turns, and the least counts, since other work on a machine slows all of them.
"""

import time
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


def model(shape: dict[str, Any], blocks: int, kind: str | None) -> torch.nn.Module:
    """Return a model of this shape in bf16, or an emulator of it, with a LoRA, ready to be tuned."""
    import peft
    from transformers import AutoModelForCausalLM

    config = llama({**shape, "vocab_size": VOCABULARY}, blocks)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network = peft.get_peft_model(packed(network, kind), peft.LoraConfig(r=8, target_modules="all-linear"))
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
