"""Hostile inputs: good models, adapters, rows, recipes and manifests, each with one thing wrong, given to a command.

Each case (:mod:`chaos.corpus`) has to end in one sentence that says what is wrong, with nothing published, or, where
the case says so, in an output that is whole. Some of them by hand, with ``tests`` among the paths of Python:
``python -c "from chaos.hostile import main; main()" DIRECTORY PATTERN``.
"""

import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from support.forkserver import warm_process

from chaos.corpus import COMMANDS, Case, cases
from chaos.results import FAILED, Result, Verdict, counts, markdown

SECONDS = 60  # the most that a case may take
_MEMORY = 24 << 30  # bytes of address space: a bomb ends as MemoryError, which nothing should ever raise


def make_good(directory: Path) -> Path:
    """Make the good inputs, by the commands themselves, in a process of its own: ``model``, ``emulator`` and so on."""
    directory.mkdir(parents=True)
    process = warm_process(_make_good, directory)
    process.start()
    process.join()
    assert process.exitcode == 0, (directory / "log").read_text()
    return directory


def _make_good(directory: Path) -> None:
    from emloc_llama import LLAMA
    from support.models import save_tiny_model
    from support.rows import example_rows, write_jsonl

    with (directory / "log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        os.chdir(directory)
        config = {**LLAMA.tiny_configs[0], "num_hidden_layers": 2}
        save_tiny_model(config, directory / "whole")
        from transformers import AutoModelForCausalLM

        shutil.copytree(directory / "whole", directory / "model")
        (directory / "model" / "model.safetensors").unlink()
        AutoModelForCausalLM.from_pretrained("whole").save_pretrained("model", max_shard_size="60kB")
        shutil.rmtree(directory / "whole")
        write_jsonl(directory / "rows.jsonl", example_rows()[:40])
        lines = (
            "compress model --data rows.jsonl --samples 4 --selection 2 --paper -o emulator",
            "train emulator --data rows.jsonl --steps 1 --rank 2 -o adapter",
            "correct adapter --base model --clamp 1 -o corrected",
        )
        for line in lines:
            assert _emloc(line.split()) == 0, line
        fields = "".join(
            f"{key} = {json.dumps(value)}\n" for key, value in config.items() if isinstance(value, int | float | str)
        )
        entry = (
            f'id = "tiny"\nfamily = "llama"\ncheckpoint = "model"\n[presets.default]\nsamples = 8\n[config]\n{fields}'
        )
        (directory / "entry.toml").write_text(entry)
        (directory / "recipe.toml").write_text('[model]\nbase = "model"\n[data]\ntrain = "rows.jsonl"\n')
        (directory / "jobs.toml").write_text("")
        (directory / "task.yaml").write_text("task: t\n")


def _emloc(arguments: list[str]) -> int:
    from emloc_core.cli import main

    sys.argv = ["emloc", *arguments]
    try:
        main()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    return 0


def run(case: Case, good: Path, directory: Path) -> Result:
    """Run a case in a process of its own, in a directory that is made for it and removed."""
    shutil.copytree(good, directory, symlinks=True)
    (directory / ".emloc-hashes.json").unlink(missing_ok=True)
    case.spoil(directory)
    start = time.monotonic()
    reader, writer = os.pipe()  # a limit on the size of files does not limit a pipe
    line = COMMANDS.get(case.command, case.command)
    child = warm_process(_run, line, case.file_size, directory, DupFd(writer))
    child.start()
    os.close(writer)
    output = _read_until(reader, start + SECONDS)
    child.join(max(0, start + SECONDS - time.monotonic()))
    if child.exitcode is None:
        child.kill()
        child.join()
        verdict, why = Verdict.WRONG, f"no end in {SECONDS} s"
    else:
        verdict, why = _judge(case, child.exitcode, output, directory)
    shutil.rmtree(directory)
    return Result(case.kind, f"{case.name} ({case.command})", verdict, why)


def _read_until(pipe: int, deadline: float) -> str:
    """Return what is written into a pipe until all its writers have ended, or until a time."""
    parts = []
    while select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
        if not (part := os.read(pipe, 1 << 16)):
            break
        parts.append(part)
    os.close(pipe)
    return b"".join(parts).decode(errors="replace")


def _run(line: str, file_size: int | None, directory: Path, writer: Any) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", EMLOC_STRICT_PLUGINS="1")
    os.chdir(directory)
    stream = writer.detach()
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    code = _emloc([argument.strip("'") for argument in line.split()])
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _judge(case: Case, code: int, output: str, directory: Path) -> tuple[Verdict, str]:
    # A progress bar may follow, or stand before it in the same line.
    lines = re.split(r"[\r\n]+|(?=emloc: )", output.strip())
    message = next((line for line in reversed(lines) if line.startswith("emloc: ")), lines[-1])
    if (directory / "evil").exists():
        return Verdict.WRONG, f"what a stranger wrote was run: {message}"
    if code == 0:
        fault = _fault(directory / "out") if case.harmless else f"exit code 0: {message}"
        return (Verdict.WRONG, fault) if fault else (Verdict.WHOLE, "")
    is_sentence = message.startswith("emloc: error: ") if code == 1 else code == 2  # of click, for options
    if not is_sentence or "Traceback" in output:
        return Verdict.UNEXPECTED, f"exit code {code}: {message}"
    if (directory / "out" / "timing.json").exists():
        return Verdict.WRONG, f"something was published: {message}"
    return Verdict.REFUSED, ""


def _fault(output: Path) -> str | None:
    """Say what is wrong with an output: shards that the library refuses, or that hold NaN, and an index that lies."""
    if not output.exists():
        return None
    keys: dict[str, str] = {}
    try:
        for path in output.glob("*.safetensors"):
            tensors = load_file(path)
            keys.update(dict.fromkeys(tensors, path.name))
            for key, tensor in tensors.items():
                if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                    return f"{key} is not finite"
        for path in output.glob("*.json"):
            content = json.loads(path.read_text(), parse_constant=float.fromhex)
            if path.name.endswith(".index.json") and content["weight_map"] != keys:
                return "the index is not that of the shards"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def campaign(directory: Path, limit: int | None = None) -> Iterator[Result]:
    """Run all cases, or so many of them evenly spread, in a new directory, and yield what comes of each."""
    good = make_good(directory / "good")
    for number, case in enumerate(cases(limit)):
        yield run(case, good, directory / f"case-{number}")


def main() -> None:
    """Run what a pattern finds in the cases' names, in a directory, and print what is a defect and the table."""
    directory, pattern = Path(sys.argv[1]), sys.argv[2]
    good = directory / "good" if (directory / "good").exists() else make_good(directory / "good")
    results = []
    for number, case in enumerate(cases()):
        if re.search(pattern, f"{case.kind}: {case.name}"):
            results.append(run(case, good, directory / f"case-{number}"))
            if results[-1].verdict in FAILED:
                print(results[-1], flush=True)
    print(markdown(counts(results)))
