"""The commands that the campaign runs, on tiny models, and what an uninterrupted run of each leaves."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from chaos.forks import Fork
from chaos.supervise import Act, Run, supervise

#: What is documented to vary from run to run: seconds and peaks of memory.
_VARYING = {"timing.json", "table.md"}
_VARYING_KEYS = {"seconds", "peak_bytes", "stages"}

_RECIPE = """
output = "out"
merge = true
model.base = "{good}/base"
data.train = "{good}/rows.jsonl"
compress = {{ samples = 6, selection = 3 }}
train = {{ steps = {steps}, save_steps = 1, lora_rank = 2, batch_size = 2, bf16 = false }}
correct.clamp = 1
"""


@dataclass(frozen=True)
class Stage:
    """A command of ``emloc``, given good inputs at ``{good}`` and an empty directory at ``{directory}``.

    Attributes:
        name: of the stage.
        command: after ``emloc``.
        other: another request for the same output.
        outputs: the directories that it publishes, in ``{directory}``.
    """

    name: str
    command: str
    other: str
    outputs: tuple[str, ...] = ("out",)


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "compress",
            "compress {good}/base --data {good}/rows.jsonl --samples 6 --selection 3 --ratio 0.8 -o {directory}/out",
            "compress {good}/base --data {good}/rows.jsonl --samples 6 --selection 3 --ratio 0.3 -o {directory}/out",
        ),
        Stage(
            "train",
            "train {good}/emulator --data {good}/rows.jsonl --steps 2 --save-steps 1 --logging-steps 2 --rank 2"
            " --batch-size 2 --no-bf16 -o {directory}/out",
            "train {good}/emulator --data {good}/rows.jsonl --steps 2 --save-steps 1 --logging-steps 2 --rank 2"
            " --batch-size 2 --no-bf16 --seed 1 -o {directory}/out",
        ),
        Stage(
            "correct",
            "correct {good}/adapter --base {good}/base --clamp 1 -o {directory}/out",
            "correct {good}/adapter --base {good}/base --clamp none -o {directory}/out",
        ),
        Stage(
            "polish",
            "polish {good}/corrected --base {good}/base --data {good}/rows.jsonl --steps 2 --save-steps 1"
            " --logging-steps 2 --batch-size 2 --no-bf16 --park disk -o {directory}/out",
            "polish {good}/uncorrected --base {good}/base --data {good}/rows.jsonl --steps 2 --save-steps 1"
            " --logging-steps 2 --batch-size 2 --no-bf16 --park disk -o {directory}/out",
        ),
        Stage(
            "merge",
            "merge {good}/corrected --base {good}/base -o {directory}/out",
            "merge {good}/uncorrected --base {good}/base -o {directory}/out",
        ),
        Stage(
            "import",
            "import {good}/foreign -o {directory}/out",
            "import {good}/other-foreign -o {directory}/out",
        ),
        Stage(
            "eval",
            "eval {good}/task.yaml --base {good}/base --emulator {good}/emulator --limit 3 -o {directory}/out",
            "eval {good}/task.yaml --base {good}/base --emulator {good}/emulator --limit 2 -o {directory}/out",
        ),
        Stage(
            "run",
            "run {directory}/recipe.toml",
            "run {directory}/other.toml",
            ("out/emulator", "out/adapter", "out/corrected", "out/merged"),
        ),
    )
}


class Bench:
    """Good inputs, made once, and a directory to run commands in.

    Args:
        root: an empty directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.good, self._pristine = self.root / "good", self.root / "pristine"
        self.references: dict[str, Reference] = {}
        self.good.mkdir(parents=True)
        run = supervise(lambda: _make_models(self.good), self.root)
        for command in (
            "compress {good}/base --data {good}/rows.jsonl --samples 6 --selection 3 --paper -o {good}/emulator",
            "train {good}/emulator --data {good}/rows.jsonl --steps 2 --rank 2 --batch-size 2 --no-bf16 --lr 1e-2"
            " -o {good}/adapter",
            "correct {good}/adapter --base {good}/base --clamp 1 -o {good}/corrected",
            "correct {good}/adapter --base {good}/base --clamp 0 -o {good}/uncorrected",
            "eval --new-task completion_nll --data {good}/rows.jsonl -o {good}/task.yaml",
        ):
            if run.code == 0:
                run = self.run(command, self.good)
        if run.code:
            raise RuntimeError(run.output)
        (self.good / ".emloc-hashes.json").unlink(missing_ok=True)
        shutil.copytree(self.good, self._pristine)

    def new_directory(self) -> Path:
        """Return a case's directory, with nothing but the recipes in it: always the same path, for outputs name it."""
        directory = self.root / "case"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for name, steps in (("recipe.toml", 2), ("other.toml", 1)):
            (directory / name).write_text(_RECIPE.format(good=self.good, steps=steps), encoding="utf-8")
        return directory

    def run(self, command: str, directory: Path, act: Act | None = None, **options: Any) -> Run:
        """Run a command line in a fork, under supervision."""
        argv = command.format(good=self.good, directory=directory).split()
        return supervise(lambda: _emloc(argv), self.root, act or (lambda _run, _call: None), **options)

    def reference(self, command: str) -> "Reference":
        """Return what an uninterrupted run of a command does and leaves."""
        if command not in self.references:
            self.references[command] = self.reference_now(command)
        return self.references[command]

    def reference_now(self, command: str) -> "Reference":
        """Return what an uninterrupted run does and leaves with the inputs as they are now."""
        directory = self.new_directory()
        start = time.monotonic()
        run = self.run(command, directory)
        return Reference(run, snapshot(directory), time.monotonic() - start)

    def is_untouched(self) -> bool:
        """Say whether the inputs are what they were."""
        return snapshot(self.good) == snapshot(self._pristine)

    def restore(self) -> None:
        """Make the inputs what they were."""
        shutil.rmtree(self.good)
        shutil.copytree(self._pristine, self.good)


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run, the files that it left by their paths in its directory, and the seconds that it took."""

    run: Run
    files: dict[str, bytes]
    seconds: float


def snapshot(directory: Path) -> dict[str, bytes]:
    """Return the content of all files of a directory, by relative path; without what may vary."""
    contents = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_dir() and not path.is_symlink():
            contents[f"{name}/"] = b""
        elif path.name in _VARYING or path.name == ".emloc-hashes.json":
            contents[name] = b""
        elif path.name == "results.json":
            contents[name] = json.dumps(_without(json.loads(path.read_text())), sort_keys=True).encode()
        elif path.name == "README.md" and (table := path.with_name("table.md")).is_file():  # the card quotes it
            contents[name] = path.read_text().replace(table.read_text(), "").encode()
        else:
            contents[name] = path.read_bytes()
    return contents


def _without(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without(value) for key, value in content.items() if key not in _VARYING_KEYS}
    return content


def _emloc(argv: Sequence[str]) -> int:
    """Run ``emloc`` with these arguments; the processes that it would start are forked."""
    from emloc_core.cli import main

    with mock.patch.object(sys, "argv", ["emloc", *argv]), mock.patch.object(subprocess, "Popen", Fork):
        main()
    return 0


def _make_models(good: Path) -> int:
    """Make a base in several shards, its rows, and two checkpoints of a foreign layout."""
    import torch
    from emloc_llama import LLAMA
    from support.internvl_chat import InternVLChat, chat_config, randomise, save_source, text_config
    from support.models import save_tiny_model
    from support.rows import example_rows, write_jsonl
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    base = save_tiny_model(LLAMA.tiny_configs[0], good / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="60kB")
    write_jsonl(good / "rows.jsonl", example_rows()[:24])
    for name, config in (
        ("foreign", chat_config(text_config("qwen2"))),
        ("other-foreign", chat_config(text_config("qwen2", tie_word_embeddings=True))),
    ):
        save_source(good / name, randomise(InternVLChat(config)), config)
    return 0
