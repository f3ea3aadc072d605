"""Predicted memory beside the measured peak, one process per case, on this CPU.

The predictions come from the config alone (`emloc plan`). Tuning is the toolkit's own stage 2 for two steps; inference
is transformers' `generate`. Weights are random where nothing but their size matters. `python benchmarks/memory.py`
prints the table and writes it to benchmarks/results/.
"""

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import goal, in_process, markdown, resident_bytes, write_results

VOCABULARY = 49152  # SmolLM2's: its tokenizer serves all of them
SHAPES = {
    "Llama 0.5B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                   "num_key_value_heads": 4},
    "Llama 1.2B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                   "num_key_value_heads": 4},
}  # fmt: skip
SMOL, HALF, ONE = "SmolLM2-135M", *SHAPES
STEPS = 2

#: Model, stage, ratio (None: the base; "plan": what the plan chooses), batch, length, gradient checkpointing.
CASES = [
    (ONE, "inference", None, 2, 256, True),
    (ONE, "tuning", "plan", 2, 256, True),
    (ONE, "tuning", None, 1, 512, True),
    (ONE, "inference", None, 4, 512, True),
    (HALF, "inference", None, 4, 1024, True),
    (HALF, "tuning", 0.5, 2, 512, True),
    (HALF, "tuning", 0.5, 1, 512, False),
    (SMOL, "tuning", None, 4, 512, True),
    (SMOL, "tuning", 0.6, 4, 512, True),
    (SMOL, "tuning", None, 2, 512, False),
]


def write_models(directory: str) -> dict[str, Any]:
    """Write the bases, and the rows."""
    import torch
    from emloc_demo.model import write_base
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    work = Path(directory)
    write_base(work / SMOL)
    tokenizer = AutoTokenizer.from_pretrained(work / SMOL)
    for name, shape in SHAPES.items():
        config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, max_position_embeddings=2048, bos_token_id=1,
                                      eos_token_id=2, pad_token_id=2, tie_word_embeddings=False, **shape)  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    write_rows(work / "rows.jsonl")
    return {}


def write_rows(path: Path) -> None:
    """Write rows of which three in four are cut at the maximum length."""
    draw = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    with path.open("w") as file:
        for row in range(64):
            text = " ".join(draw.choice(words) for _ in range(2200 if row % 4 else 200))
            file.write(json.dumps({"text": f"{text} {row}"}) + "\n")


def write_emulator(base: str, ratio: float, target: str) -> dict[str, Any]:
    """Write an emulator whose factors are random: only its size matters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from emloc_core.emulator.declared import find_linears
    from emloc_core.emulator.ranks import allocated
    from emloc_core.files.documents import read_json, write_json
    from emloc_core.plugins.manager import plugin_manager
    from emloc_core.standins import LowRank

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    ranks = allocated(find_linears(model, plugin_manager().family_for({"model_type": "llama"})), ratio).ranks
    LowRank().replace(model, ranks)
    for path in ranks:
        for parameter in model.get_submodule(path).parameters(recurse=False):
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    quantisation = LowRank().config(ranks, model, model.dtype)
    config = Path(target) / "config.json"
    write_json(config, {**read_json(config), "quantization_config": quantisation})
    return {}


def predict(base: str, stage: str, ratio: Any, batch: int, length: int, checkpointing: bool) -> dict[str, Any]:
    """Return the predicted bytes above the imports, and the ratio that was planned."""
    from emloc_core.memory.budget import largest_ratio
    from emloc_core.memory.model import MemoryModel
    from emloc_core.memory.workload import Workload
    from emloc_core.model.overhead import IMPORTS
    from emloc_core.settings import CompressSettings, TrainSettings

    train = TrainSettings(batch_size=batch, gradient_checkpointing=checkpointing)
    even = CompressSettings(allocator="uniform")  # as the emulators are
    model = MemoryModel(Path(base) / "config.json", Workload(batch, length, 0, train, "cpu"), even)
    if ratio == "plan":
        fit = largest_ratio(model, model.inference().total)
        if fit is None:
            sys.exit(f"No emulator of {base} can be tuned in the memory of inference at {batch} x {length}.")
        need, ratio = fit.need, fit.ratio
    elif stage == "inference":
        need = model.inference()
    else:
        need = model.tuning(model.plan(ratio) if ratio else None)
    return {"bytes": need.total - IMPORTS, "ratio": ratio, "terms": dict(need.terms)}


def infer(base: str, batch: int, length: int) -> dict[str, Any]:
    """Read prompts of unlike length and write one token."""
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    import emloc_core.tuning.train  # noqa: F401 - the same imports as for tuning

    floor = resident_bytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, min_new_tokens=1)
    return {"floor_bytes": floor}


def tune(model: str, rows: str, output: str, batch: int, length: int, checkpointing: bool) -> dict[str, Any]:
    """Take two steps of stage 2: the second has the optimiser's states."""
    from contextlib import redirect_stdout

    from transformers.models.llama import modeling_llama  # noqa: F401

    from emloc_core.requests import TrainRequest
    from emloc_core.settings import TrainSettings
    from emloc_core.tuning.exact import prepare

    floor = resident_bytes()
    settings = TrainSettings(steps=STEPS, batch_size=batch, max_length=length, gradient_checkpointing=checkpointing)
    with redirect_stdout(sys.stderr):
        prepare(TrainRequest(model=model, data=rows, output=Path(output), settings=settings)).run()
    return {"floor_bytes": floor}


def measure(work: Path, case: tuple[Any, ...]) -> dict[str, Any]:
    name, stage, ratio, batch, length, checkpointing = case
    base = work / name
    predicted = in_process(predict, base, stage, ratio, batch, length, checkpointing)
    model = base
    if predicted["ratio"] is not None:
        model = work / f"{name}-{predicted['ratio']}"
        if not model.exists():
            in_process(write_emulator, base, predicted["ratio"], model)
    if stage == "inference":
        reading = in_process(infer, base, batch, length)
    else:
        output = work / f"adapter-{CASES.index(case)}"
        reading = in_process(tune, model, work / "rows.jsonl", output, batch, length, checkpointing)
    model_kind = "base" if predicted["ratio"] is None else "emulator"
    return {
        "model": name,
        "stage": f"{'inference' if stage == 'inference' else 'LoRA'} on {model_kind}",
        "ratio": predicted["ratio"],
        "ratio_chosen_by_plan": ratio == "plan",
        "batch": batch,
        "length": length,
        "checkpointing": checkpointing if stage == "tuning" else None,
        "floor_bytes": reading["floor_bytes"],
        **compared(predicted, reading),
    }


def compared(predicted: dict[str, Any], reading: dict[str, Any]) -> dict[str, Any]:
    """Return the predicted and the measured peak above the imports, in bytes, and the relative error."""
    measured = reading["peak_rss_bytes"] - reading["floor_bytes"]
    return {
        "predicted_bytes": predicted["bytes"],
        "predicted_terms": predicted["terms"],
        "measured_bytes": measured,
        "error": round(predicted["bytes"] / measured - 1, 4),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        in_process(write_models, work)
        rows = [measure(work, case) for case in CASES]
    worst = max(abs(row["error"]) for row in rows)
    smallest = min(row["measured_bytes"] for row in rows)
    inference, tuned = rows[0], rows[1]
    share = tuned["measured_bytes"] / inference["measured_bytes"]
    goals = [
        goal("largest error of a prediction, of the peak above imports", 0.1, worst, worst <= 0.1),
        goal("smallest measured peak above imports, bytes", 10**9, smallest, smallest >= 10**9),
        goal("number of cases", 8, len(rows), len(rows) >= 8),
        goal(
            f"tuning the emulator of {tuned['model']} at the plan's ratio of {tuned['ratio']}, of base inference",
            1.0,
            round(share, 3),
            share <= 1,
        ),
    ]
    header = ["model", "stage", "ratio", "batch", "length", "checkpointing", "predicted, MB", "measured, MB", "error"]
    ticks = {True: "yes", False: "no", None: "-"}
    cells = [
        [row["model"], row["stage"], str(row["ratio"] or "-"), row["batch"], row["length"], ticks[row["checkpointing"]],
         round(row["predicted_bytes"] / 1e6), round(row["measured_bytes"] / 1e6), f"{row['error']:+.1%}"]
        for row in rows
    ]  # fmt: skip
    write_results("memory", "python benchmarks/memory.py", rows, goals, markdown(header, cells))


if __name__ == "__main__":
    main()
