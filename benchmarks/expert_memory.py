"""Plans of stages 1 and 2 of a mixture of experts beside the measured peak: blocks as wide as those of Qwen3-30B-A3B.

Packed weights are random: only their size matters. Each kind is tuned for two steps
in a process of its own, on this CPU. All weights are read once before: of a mapped file, embeddings of words that no
row has would take no memory, which on a GPU they do. Stage 1 is of one block with a quarter of the experts: more of
them take longer, not more memory. `python benchmarks/expert_memory.py` prints the table and writes it to
benchmarks/results/.
"""

import tempfile
from pathlib import Path
from typing import Any

from harness import goal, in_process, markdown, resident_bytes, write_results
from memory import VOCABULARY, compared, tune, write_rows

KINDS = ("nf4", "trellis")
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
BATCH, LENGTH = 2, 512
#: Of stage 1.
FEWER, SAMPLES, COMPRESSED = {"num_hidden_layers": 1, "num_experts": 32}, 48, KINDS


def write_bases(directory: str) -> dict[str, Any]:
    """Write a base for each stage, all rows, and the rows that are cut at the length."""
    import torch
    from emloc_demo.model import write_base
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    work = Path(directory)
    write_base(work / "smollm2")
    for name, fewer in (("base", {}), ("smaller", FEWER)):
        config = AutoConfig.for_model("qwen3_moe", vocab_size=VOCABULARY, **SHAPE | fewer)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(work / name)
        AutoTokenizer.from_pretrained(work / "smollm2").save_pretrained(work / name)
    write_rows(work / "rows.jsonl")
    lines = (work / "rows.jsonl").read_text().splitlines(keepends=True)
    (work / "long.jsonl").write_text("".join(line for line in lines if len(line) > 4 * LENGTH))
    return {}


def compress(base: str, rows: str, kind: str, output: str) -> dict[str, Any]:
    """Make an emulator; return its predicted peak, and the memory of the process before, with its imports."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401

    from emloc_core.emulator.compress import Compress
    from emloc_core.memory import streamed
    from emloc_core.memory.model import MemoryModel
    from emloc_core.memory.workload import Workload
    from emloc_core.model.overhead import IMPORTS
    from emloc_core.requests import CompressRequest
    from emloc_core.settings import CompressSettings

    settings = CompressSettings(kind=kind, keep="head", samples=SAMPLES, selection=0, max_length=LENGTH)
    job = Compress(CompressRequest(model=base, data=rows, output=Path(output), device="cpu", settings=settings))
    floor = resident_bytes()
    job.run()
    model = MemoryModel(Path(base) / "config.json", Workload(1, LENGTH, device="cpu"), settings)
    need = streamed.compress(model, model.plan())
    return {"bytes": need.total - IMPORTS, "terms": dict(need.terms), "floor_bytes": floor}


def write_emulator(base: str, kind: str, target: str) -> dict[str, Any]:
    """Write an emulator of a kind with random parts, and return its predicted peak above the imports."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from emloc_core.files.documents import read_json, write_json
    from emloc_core.memory.model import MemoryModel
    from emloc_core.memory.workload import Workload
    from emloc_core.model.overhead import IMPORTS
    from emloc_core.settings import CompressSettings, TrainSettings

    train = TrainSettings(batch_size=BATCH)
    # Only the experts are measured: the emulator written here has the vocabulary of its base.
    settings = CompressSettings(kind=kind, keep="head")
    plans = MemoryModel(Path(base) / "config.json", Workload(BATCH, LENGTH, 0, train, "cpu"), settings)
    plan = plans.plan()
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    before = set(model.parameters())  # kept alive: a new parameter must not reuse the id of an old one
    plans.format.replace(model, plan.ranks)
    for parameter in set(model.parameters()) - before:
        random = torch.randint(0, 200, parameter.shape, dtype=torch.uint8)
        parameter.data = random if parameter.dtype == torch.uint8 else (random / 2_000_000).to(parameter.dtype)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    quantisation = plans.format.config(plan.ranks, model, model.dtype)
    config = Path(target) / "config.json"
    write_json(config, {**read_json(config), "quantization_config": quantisation})
    need = plans.tuning(plan)
    return {"bytes": need.total - IMPORTS, "terms": dict(need.terms)}


def tune_read(*args: Any) -> dict[str, Any]:
    """Take two steps of stage 2 on a model whose weights have all been read; see ``memory.tune``."""
    from unittest import mock

    from emloc_core.files import pretrained

    load = pretrained.load_model

    def load_and_read(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        for parameter in model.parameters():
            parameter.max()
        return model

    with mock.patch.object(pretrained, "load_model", load_and_read):
        return tune(*args)


def measure(work: Path, stage: str, kind: str) -> dict[str, Any]:
    if stage == "compress":
        predicted = reading = in_process(compress, work / "smaller", work / "long.jsonl", kind, work / f"small-{kind}")
    else:
        predicted = in_process(write_emulator, work / "base", kind, work / kind)
        reading = in_process(tune_read, work / kind, work / "rows.jsonl", work / f"adapter-{kind}", BATCH, LENGTH, True)
    return {"stage": stage, "kind": kind, **compared(predicted, reading)}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        in_process(write_bases, work)
        cases = [("train", kind) for kind in KINDS] + [("compress", kind) for kind in COMPRESSED]
        rows = [measure(work, *case) for case in cases]
    worst = max(abs(row["error"]) for row in rows)
    goals = [goal("largest error of a prediction, of the peak above imports", 0.06, worst, worst <= 0.06)]
    header = ["stage", "kind", "predicted, MB", "measured, MB", "error"]
    cells = [
        [row["stage"], row["kind"], *(f"{row[name] / 1e6:,.0f}" for name in ("predicted_bytes", "measured_bytes")),
         f"{row['error']:+.1%}"]
        for row in rows
    ]  # fmt: skip
    command = "python benchmarks/expert_memory.py"
    write_results("expert_memory", command, rows, goals, markdown(header, cells), batch=BATCH, length=LENGTH)


if __name__ == "__main__":
    main()
