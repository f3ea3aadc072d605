"""``nf4`` beside GPTQ (Frantar et al., 2023, arXiv 2210.17323) of llm-compressor: processor time and error of a block.

Both are given the same inputs of the Linears of one block, and round its weights with feedback to 4.13 bits a number:
``nf4`` to NF4, with a scale in eight bits for every 64, and llm-compressor by its scheme W4A16, to integers with a
scale in sixteen bits for every 128, or, where 128 does not divide the width, as in SmolLM2, for every 64, in 4.25 bits.
Timed is what follows the forward pass, in one thread: the sums of ``x x^T`` and the rounding. The error is of the
outputs on these inputs, ``||(What - W) X|| / ||W X||``, the mean over the Linears.

The block is the last of four of SmolLM2-135M, on the demo's messages; or, on request (``1B 8B``), one at the widths of
Llama-3.2-1B and Llama-3.1-8B with random weights. llm-compressor requires older versions of transformers, but its
functions of tensors, which are used here, do not::

    pip install --no-deps --target build/gptq llmcompressor compressed-tensors loguru
    PYTHONPATH=build/gptq python benchmarks/gptq.py
"""

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import goal, in_process, markdown, write_results
from kinds import SIZES, smollm2
from scale import prepare

#: Linears that read the same inputs.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
WAYS = ("nf4", "GPTQ")


def inputs_of(work: str, samples: int) -> tuple[Mapping[str, Any], Mapping[str, list[Any]]]:
    """Return the Linears of the last block of ``work``/base, and the inputs of the first of each group, row by row."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from emloc_core.data.rows import load_rows
    from emloc_core.data.tokenize import encode

    model = AutoModelForCausalLM.from_pretrained(Path(work) / "base", dtype="auto").eval()
    block = model.model.layers[-1]
    inputs: dict[str, list[Any]] = {group[0]: [] for group in GROUPS}

    def record(name: str, _module: Any, args: tuple[Any, ...]) -> None:
        inputs[name].append(args[0][0].float())

    for name in inputs:
        block.get_submodule(name).register_forward_pre_hook(partial(record, name))
    rows = load_rows(str(Path(work) / "rows.jsonl"))[:samples]
    with torch.no_grad():
        for sample in encode(rows, AutoTokenizer.from_pretrained(Path(work) / "base")):
            model.model(torch.tensor([sample.input_ids]))
    return {name: block.get_submodule(name).float() for group in GROUPS for name in group}, inputs


def by_nf4(linears: Mapping[str, Any], inputs: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return the weights as stage 1 rounds them: each group together, with one sum."""
    from emloc_core.algorithms.products import by_onednn
    from emloc_core.standins.nf4 import NF4

    kind, rounded = NF4(), {}
    with by_onednn():
        for group in GROUPS:
            weights = [linears[name].weight for name in group]
            for name, weight, part in zip(
                group, weights, kind.fit(weights, gram_of(inputs[group[0]]), ()), strict=True
            ):
                parts = list(kind.pack(part, weight.dtype).values())
                rounded[name] = kind.read(parts, tuple(weight.shape), weight.dtype).weight()
    return rounded


def gram_of(rows: list[Any]) -> Any:
    """Return the sum of ``x x^T`` over inputs, as stage 1 has it."""
    from emloc_core.algorithms.statistics import Gram

    gram = Gram("input", rows[0].shape[1])
    for row in rows:
        gram.add(row)
    return gram


def by_gptq(linears: Mapping[str, Any], inputs: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return the weights as llm-compressor rounds them: one by one, each with a sum of its own."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian

    size = 64 if any(linear.in_features % 128 for linear in linears.values()) else 128
    scheme = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=size, actorder="static")
    rounded = {}
    for group in GROUPS:
        for name in group:
            linear, sums, count = linears[name], make_empty_hessian(linears[name]), torch.zeros(())
            for row in inputs[group[0]]:
                sums, count = accumulate_hessian(row[None], linear, sums, count)
            parts = linear.weight.detach().view(linear.out_features, -1, size)
            scales, zeros = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme)
            weights, sums = linear.weight.detach().clone()[None], (sums / count)[None]
            rounded[name] = quantize_weight(weights, sums, scales[None], zeros[None], None, scheme)[0][0]
    return rounded


def measure(work: str, samples: int, way: str) -> dict[str, Any]:
    """Round a block in one way; return the processor seconds, and the mean error of a Linear."""
    import torch

    from emloc_core.algorithms.factorize import output_error

    quantize = {"nf4": by_nf4, "GPTQ": by_gptq}[way]
    with torch.no_grad():
        linears, inputs = inputs_of(work, samples)
        small = {name: torch.nn.Linear(128, 128) for name in linears}  # imports, and tables that are made once
        quantize(small, {group[0]: [torch.randn(8, 128)] for group in GROUPS})
        started = time.process_time()
        weights = quantize(linears, inputs)
        seconds = time.process_time() - started
        grams = {name: gram_of(inputs[group[0]]).matrix for group in GROUPS for name in group}
        errors = [output_error(linear.weight, weights[name], grams[name]) for name, linear in linears.items()]
    return {"processor_seconds": seconds, "mean_error": sum(errors) / len(errors)}


def main() -> None:
    rows = []
    for size in sys.argv[1:] or ["SmolLM2"]:
        blocks, samples = SIZES[size]
        with tempfile.TemporaryDirectory() as directory:
            in_process(smollm2, directory, blocks) if size == "SmolLM2" else in_process(
                prepare, directory, size, blocks
            )
            for way in WAYS:
                measurement = in_process(measure, directory, samples, way, env={"OMP_NUM_THREADS": "1"})
                rows.append({"size": size, "samples": samples, "name": way, **measurement})
                print(json.dumps(rows[-1]), file=sys.stderr)
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Write the results, of pairs of rows."""
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    table = markdown(
        ["widths of", "rows", "nf4, s", "GPTQ, s", "ratio", "error of nf4", "error of GPTQ"],
        [
            [
                ours["size"],
                ours["samples"],
                *(round(row["processor_seconds"], 1) for row in (ours, theirs)),
                f"{ours['processor_seconds'] / theirs['processor_seconds']:.2f}",
                *(f"{row['mean_error']:.5f}" for row in (ours, theirs)),
            ]
            for ours, theirs in pairs
        ],
    )
    time_of, error_of = (
        max(ours[key] / theirs[key] for ours, theirs in pairs) for key in ("processor_seconds", "mean_error")
    )
    goals = [
        goal("time over GPTQ's, the most", "at most 1.0", round(time_of, 2), time_of <= 1),
        goal("error over GPTQ's, the most", "at most 1.0", round(error_of, 3), error_of <= 1),
    ]
    command = "PYTHONPATH=build/gptq python benchmarks/gptq.py"
    write_results("gptq", command, rows, goals, table, llmcompressor=version("llmcompressor"))


if __name__ == "__main__":
    main()
