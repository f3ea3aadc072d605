"""Processor time until a command answers, its children's included, beside that of importing torch and transformers.

Of training it is the time for one step on 20,000 rows of a hundred words, with a model whose step costs nothing.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import goal, markdown, write_results

RUNS = 3
PYTHON, EMLOC = [sys.executable, "-c"], [str(Path(sys.executable).with_name("emloc"))]
ENTRY = "meta-llama/Llama-3.1-8B"
RECIPE = '[model]\nbase = "base"\nmemory = "1GiB"\n[data]\ntrain = "rows.jsonl"\n[train]\nmax_length = 256\n'
#: Rows of each form, as `emloc train` takes them.
FIRST_STEPS = {"prompt and completion": [], "conversations": [], "preferences": ["--objective", "dpo"]}
#: A model of the base's tokenizer whose step costs nothing.
SMALL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 49152}  # fmt: skip
WORDS = (
    "the of customer order ship delay refund please reply number account invoice payment date when where how can you",
    "help me with my device it stopped working yesterday after update screen battery charger",
)
#: Commands by what they are, with the most seconds that they are to take; the first three have no goal of their own.
COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "python -c pass": ([*PYTHON, "pass"], None),
    "import torch, transformers": ([*PYTHON, "import torch, transformers"], None),
    "emloc train --help": ([*EMLOC, "train", "--help"], None),
    "import emloc_core": ([*PYTHON, "import emloc_core"], 0.1),
    "emloc --help": ([*EMLOC, "--help"], 0.4),
    "emloc families": ([*EMLOC, "families"], 0.4),
    "an unknown model type": ([*EMLOC, "plan", "odd"], 1.5),
    "a missing directory": ([*EMLOC, "compress", "missing", "--data", "rows.jsonl", "-o", "o"], 1.5),
    "a bad setting": ([*EMLOC, "train", "base", "--data", "rows.jsonl", "--batch-size", "0", "-o", "o"], 1.5),
    "a missing unit": ([*EMLOC, "plan", "base", "--memory", "12"], 1.5),
    "a wrong path of rows": ([*EMLOC, "train", "base", "--data", "none.jsonl", "-o", "o"], 1.5),
    "an unknown kind": ([*EMLOC, "plan", "base", "--kind", "six-bit"], 1.5),
    "emloc plan, a registry entry": ([*EMLOC, "plan", ENTRY], 3.0),
    "emloc plan, a registry entry, 12 GiB": ([*EMLOC, "plan", ENTRY, "--memory", "12GiB"], 3.0),
    "emloc plan, a local model": ([*EMLOC, "plan", "base", "--memory", "1GiB"], 3.0),
    "emloc run --dry-run": ([*EMLOC, "run", "recipe.toml", "--dry-run"], 6.0),
    **{
        f"emloc train, 20,000 {form}": (
            [
                *EMLOC,
                "train",
                "small",
                "--data",
                f"{form}.jsonl",
                "--steps",
                "1",
                "--batch-size",
                "2",
                "--no-bf16",
                "-o",
                "adapter",
                *options,
            ],
            8.0,
        )
        for form, options in FIRST_STEPS.items()
    },
}
#: Commands that keep what they find for the next time.
KEEPING = ("emloc plan", "emloc run")


def least_seconds(command: Sequence[str], directory: Path, cache: Path | None) -> float:
    """Return the least processor time of several runs: what else the machine does makes it longer.

    Args:
        command: may fail, as an error of the user's does.
        place: working directory.
        cache: of what is kept between runs; None: a new one each time.
    """
    seconds = []
    for _ in range(RUNS):
        shutil.rmtree(directory / "adapter", ignore_errors=True)
        with TemporaryDirectory() as new:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            environment = {**os.environ, "COLUMNS": "100", "EMLOC_CACHE": str(cache or new)}
            subprocess.run(command, cwd=directory, env=environment, check=False, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def write_many_rows(directory: Path) -> None:
    """Write 20,000 rows of each form, and the model that is trained on them."""
    draw, vocabulary = random.Random(0), " ".join(WORDS).split()

    def sentence(words: int) -> str:
        return " ".join(draw.choices(vocabulary, k=words))

    examples = [(f"{sentence(60)} {number}?", f" {sentence(40)}.", f" {sentence(40)}.") for number in range(20_000)]

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows: dict[str, list[dict[str, Any]]] = {
        "prompt and completion": [{"prompt": prompt, "completion": answer} for prompt, answer, _ in examples],
        "conversations": [{"messages": turn("user", a) + turn("assistant", b)} for a, b, _ in examples],
        "preferences": [
            {"prompt": turn("user", a), "chosen": turn("assistant", b), "rejected": turn("assistant", c)}
            for a, b, c in examples
        ],
    }
    for form, form_rows in rows.items():
        (directory / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in form_rows))
    model = (
        f"import torch; from transformers import AutoConfig, AutoModelForCausalLM as Auto;"
        f"Auto.from_config(AutoConfig.for_model(**{SMALL!r}), dtype=torch.float32).save_pretrained('small')"
    )
    subprocess.run([*PYTHON, model], cwd=directory, check=True, stdout=subprocess.DEVNULL)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(directory / "base" / name, directory / "small" / name)


def main() -> None:
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        (directory / "odd").mkdir()
        (directory / "odd" / "config.json").write_text('{"model_type": "odd"}')
        texts = (
            json.dumps({"prompt": f"Add one to {number}: ", "completion": str(number + 1)}) for number in range(200)
        )
        (directory / "rows.jsonl").write_text("\n".join(texts))
        (directory / "recipe.toml").write_text(RECIPE)
        write = f"from emloc_demo.model import write_base; write_base({str(directory / 'base')!r})"
        subprocess.run([*PYTHON, write], check=True, stdout=subprocess.DEVNULL)
        write_many_rows(directory)
        for name, (command, allowed) in COMMANDS.items():
            times: dict[str, Path | None] = {name: None}
            if name.startswith(KEEPING):
                times = {f"{name}: for the first time": None, f"{name}: again": directory / "cache"}
            for label, cache in times.items():
                seconds = least_seconds(command, directory, cache)
                rows.append({"command": label, "seconds": seconds, "allowed": allowed})
                print(f"{seconds:6.2f} s  {label}", flush=True)
    imports = rows[1]["seconds"]
    table = markdown(
        ["command", f"processor seconds, least of {RUNS}", "x importing torch and transformers"],
        [[row["command"], f"{row['seconds']:.2f}", f"{row['seconds'] / imports:.2f}"] for row in rows],
    )
    goals = [
        goal(f"{row['command']}: processor seconds", f"at most {row['allowed']:g}", round(row["seconds"], 2),
             row["seconds"] <= row["allowed"])
        for row in rows if row["allowed"] is not None
    ]  # fmt: skip
    write_results("startup", "make bench-startup", rows, goals, table)


if __name__ == "__main__":
    main()
