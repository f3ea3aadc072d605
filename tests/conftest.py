"""A tiny Llama with a real tokenizer, and rows that it can learn; virtual environments with the built wheel."""

import fcntl
import io
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from emloc_llama import LLAMA
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from emloc_core.cli import main
from emloc_core.data.rows import load_rows
from emloc_core.emulator.compress import Compression
from emloc_core.evaluation import system as evaluate_system
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.settings import CompressSettings

# The workers of pytest share the cores already, and threads that wait for each other in tiny models take many times as
# long. The processes that tests start take it from the environment.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

ANIMALS = ["cat", "dog", "horse", "cow", "goat", "duck", "hen", "fox", "bear", "wolf", "mouse", "frog"]
COLOURS = ["red", "blue", "green", "black", "white", "brown", "grey", "pink", "gold", "teal"]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

#: Fields of TRL's SFTConfig for three steps on a CPU that change what a tiny model says.
PLAIN_TRAINING = {"max_steps": 3, "use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": 1e-2}


def example_rows() -> list[dict[str, str]]:
    """120 distinct rows: a sentence to write from an animal and a colour."""
    return [
        {"prompt": f"animal: {animal}, colour: {colour}. sentence:", "completion": f" a {colour} {animal} runs."}
        for animal in ANIMALS
        for colour in COLOURS
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Write ``rows`` to ``path``, one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer of at most 128 tokens with a chat template: bos 1, eos 2, pad 0, as in the tiny config."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"]
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789.,:?!")
    trainer = trainers.BpeTrainer(
        vocab_size=128, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([row["prompt"] + row["completion"] for row in example_rows()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny_model(settings: Mapping[str, Any], directory: Path) -> Path:
    """Save a model with its tokenizer, fp32 with seeded random weights, from arguments of ``AutoConfig.for_model``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer: fp32, seeded random weights."""
    return save_tiny_model(LLAMA.tiny_configs[0], tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def emloc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run a command as ``emloc`` does; return exit code, stdout, stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["emloc", *map(str, argv)])
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


_run = subprocess.run


def run_here(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Stand for ``subprocess.run``: run a stage or an evaluation in this process, for a new one takes seconds."""
    if command[:2] != [sys.executable, "-m"]:  # git, say, which libraries ask for a version
        return _run(command, **options)
    module, *arguments = command[2:]
    captured = options.get("capture_output", False)
    out, err = (io.StringIO(), io.StringIO()) if captured else (sys.stderr, sys.stderr)
    with mock.patch.object(sys, "argv", ["emloc", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            code = evaluate_system.main(*arguments) if module == "emloc_core.evaluation.system" else main()
        except SystemExit as exit:
            code = exit.code
    said = (out.getvalue(), err.getvalue()) if captured else ("", "")
    return subprocess.CompletedProcess(command, int(code or 0), *said)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 120 distinct prompt and completion rows."""
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", example_rows())


@pytest.fixture(scope="session")
def tiny_emulator(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emulator of ``tiny_model`` that holds out 12 calibration and 6 selection rows of ``rows_file``."""
    settings = CompressSettings(samples=12, selection=6, ratio=0.6)
    output = tmp_path_factory.mktemp("tiny-emulator") / "emulator"
    return Compression(Checkpoint(tiny_model), load_rows(str(rows_file)), output, settings).run()


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees the heavy dependencies of the test environment, and nothing of the checkout."""

    directory: Path

    def install(self, wheel: Path) -> None:
        """Install a wheel: no dependencies, no network."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.directory / "bin" / "python")]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)

    def run(self, script: str, *argv: object, cwd: Path) -> str:
        """Run a command of the environment, broken plugins being errors; return what it prints on stdout."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.directory / "bin" / script), *map(str, argv)]
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**environment, "EMLOC_STRICT_PLUGINS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The wheel of emloc, built from the checkout, once for all workers of pytest."""
    base = tmp_path_factory.getbasetemp()
    place = (base if worker_id == "master" else base.parent) / "wheel"
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(place.glob("*.whl")):
            build = [
                sys.executable,
                "-m",
                "build",
                "--wheel",
                "--outdir",
                str(place),
                str(Path(__file__).parent.parent),
            ]
            done = subprocess.run(build, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    (built,) = place.glob("emloc-*.whl")
    return built


@pytest.fixture(scope="session")
def new_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Environment]:
    """A function that makes a virtual environment with emloc's wheel in it."""

    def make() -> Environment:
        environment = Environment(tmp_path_factory.mktemp("environment"))
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment.directory)], check=True)
        (site,) = environment.directory.glob("lib/python*/site-packages")
        # A path in a .pth file is searched, and the .pth files there, such as that of the checkout, are not read.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        environment.install(wheel)
        return environment

    return make
