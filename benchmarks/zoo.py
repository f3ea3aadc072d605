"""Overhead of the zoo's driver per job, and the speed-up of two workers over one on single-threaded jobs."""

import argparse
import json
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from harness import goal, in_process, markdown, write_results

from emloc_core.zoo.convert import convert
from emloc_core.zoo.engines.local import LocalEngine
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.task import Demand
from emloc_core.zoo.state.record import JobRecord
from emloc_core.zoo.state.store import Store

#: A model whose emulator takes one thread some seconds, beside the imports that every worker needs.
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 6,
    "num_attention_heads": 10, "num_key_value_heads": 5, "vocab_size": 128, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROWS = 48
#: A worker with nothing to do; all else is as in the real one.
IDLE = """
import sys
from emloc_core.zoo.engines import worker
from emloc_core.zoo.jobs.outcome import Outcome
worker.run = lambda job, directory: Outcome(None)
sys.exit(worker.main(sys.argv[1]))
"""


class IdleEngine(LocalEngine):
    """Workers that do nothing."""

    command = (sys.executable, "-c", IDLE)


def make_models(root: str, count: int) -> dict[str, Any]:
    """Write so many seeded models with a tokenizer of single words, and rows."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(100))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    settings = dict(CONFIG)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    for seed in range(count):
        torch.manual_seed(seed)
        directory = Path(root) / "models" / f"model-{seed}"
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    texts = [" ".join(f"w{(row * 7 + index * (row + 3)) % 100}" for index in range(96)) for row in range(ROWS)]
    (Path(root) / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {}


def compress_all(root: str, workers: int) -> dict[str, Any]:
    """Make the emulators of all models; return the seconds from the first start to the last end, and of all in all."""
    settings = {"samples": 32, "selection": 8}
    jobs = [
        ZooJob(name=path.name, model=str(path), data=f"{root}/rows.jsonl", compress=settings)
        for path in sorted((Path(root) / "models").iterdir())
    ]
    started = time.perf_counter()
    records = _convert(jobs, Path(root) / f"zoo-{workers}", workers)
    total = time.perf_counter() - started
    attempts = [record.attempts[0] for record in records]
    last = max(attempt.started + (attempt.seconds or 0) for attempt in attempts)
    return {"seconds": last - min(attempt.started for attempt in attempts), "with_planning": total}


def drive_trivial(root: str, count: int) -> dict[str, Any]:
    """Do so many jobs that do nothing; return the processor's and the clock's milliseconds per job."""
    names = [f"job-{number}" for number in range(count)]
    processor, clock = time.process_time(), time.perf_counter()
    with closing(Store(Path(root) / "trivial", create=True)) as store:
        store.add([ZooJob(name=name, model="none/none") for name in names], names)
        store.plan(dict.fromkeys(names, Demand(memory=0, disk=0)))
    _convert([], Path(root) / "trivial", 2, IdleEngine)
    return {
        "driver_ms": (time.process_time() - processor) * 1e3 / count,
        "clock_ms": (time.perf_counter() - clock) * 1e3 / count,
    }


def _convert(jobs: list[ZooJob], zoo: Path, workers: int, engine: type[LocalEngine] = LocalEngine) -> list[JobRecord]:
    records = convert(jobs, zoo, lambda lock: engine(workers, inherited=[lock]))
    assert all(record.state == "done" for record in records), [record.attempts for record in records]
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--trivial", type=int, default=1000)
    parser.add_argument("--dry", action="store_true", help="Print the figures and write nothing.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        in_process(make_models, root, options.models)
        one = in_process(compress_all, root, 1)
        two = in_process(compress_all, root, 2)
        trivial = in_process(drive_trivial, root, options.trivial)
    speedup = one["seconds"] / two["seconds"]
    rows = [
        {
            "jobs": options.models,
            "workers": workers,
            "seconds": measurement["seconds"],
            "with_planning": measurement["with_planning"],
        }
        for workers, measurement in ((1, one), (2, two))
    ]
    rows.append({"jobs": options.trivial, "workers": 2, **trivial})
    if options.dry:
        print(json.dumps({"speedup": speedup, "rows": rows}, indent=2))
        return
    table = markdown(
        ["jobs", "workers", "seconds, first start to last end", "with planning"],
        [[row["jobs"], row["workers"], f"{row['seconds']:.1f}", f"{row['with_planning']:.1f}"] for row in rows[:2]],
    )
    table += (
        f"\n\n{options.trivial:,} jobs that do nothing, two workers: {trivial['driver_ms']:.1f} ms of the driver's "
        f"processor time per job, {trivial['clock_ms']:.0f} ms by the clock, in which the worker's Python starts."
    )
    goals = [
        goal("speedup of two workers", "at least 1.6", round(speedup, 2), speedup >= 1.6),
        goal("driver time per job, ms", "at most 20", round(trivial["driver_ms"], 2), trivial["driver_ms"] <= 20),
    ]
    write_results("zoo", "make bench-zoo", rows, goals, table)


if __name__ == "__main__":
    main()
