"""A tiny Llama with a real tokenizer, and rows that it can learn; virtual environments with the built wheel."""

import fcntl
import gc
import os
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.paths import ROOT
from support.rows import example_rows, write_jsonl
from support.run import patch_calls

from emloc_core.cli import main

# The process that distributes tests reads this file too: torch is imported where it is used.

if threading.current_thread() is threading.main_thread():
    # What is started in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The workers of pytest share the cores already, and threads that wait for each other in tiny models take many times as
# long. The processes that tests start take it from the environment.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for GPUs are run without one; `make test-gpu` compiles them
os.environ["EMLOC_CACHE"] = ""  # what one test traced is not what another one does
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes compiles what it does with odd shapes: eight seconds per process


#: What takes longest, first, so that the workers of pytest end at about the same time.
LONG = ("zoo/test_convert.py", "memory", "tuning", "emulator", "evaluation", "registry", "cli", "zoo", "conformance",
        "scaffold", "chaos", "families", "demo", "plugins", "exact")  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # of every family, one tiny config is checked with every change
        case = getattr(item, "callspec", None)
        if case and item.path.parent.name == "conformance" and case.params.get("index", 0) > 0:
            item.add_marker(pytest.mark.thorough)
    order = {ROOT / "tests" / name: index for index, name in enumerate(LONG)}
    last = len(LONG)
    items.sort(key=lambda item: min((order.get(path, last) for path in (item.path, *item.path.parents)), default=last))


def pytest_collection_finish() -> None:
    """Let the garbage collector skip what is imported, which stays, and run seldom: it took a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_unconfigure() -> None:
    """Unfreeze all again: libraries complain at the end about what is left."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Begin every test with the same random numbers, whichever tests ran before it in its process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Collect no garbage: where a test reaches the end of the stack, freeing what others left would fail there."""
    from emloc_core.processes.environment import without_collections

    with without_collections():
        yield


@pytest.fixture(scope="session", autouse=True)
def measured_soon() -> None:
    """Let plans measure this machine by one small product and one read: tenths of a second add up over many plans."""
    from emloc_core.memory import speed

    speed._SECONDS, speed._SIDES["cpu"] = 1e-6, 64


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer: fp32, seeded random weights."""
    from emloc_llama import LLAMA
    from support.models import save_tiny_model

    return save_tiny_model(LLAMA.tiny_configs[0], tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def shallow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one block, which takes a third of the time to plan."""
    from emloc_llama import LLAMA
    from support.models import save_tiny_model

    shallow = LLAMA.tiny_configs[0] | {"num_hidden_layers": 1}
    return save_tiny_model(shallow, tmp_path_factory.mktemp("models") / "shallow-llama")


@pytest.fixture
def calls_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stages and systems run in the process of the test, and not in one of their own."""
    patch_calls(monkeypatch)


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


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 120 distinct prompt and completion rows."""
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", example_rows())


@pytest.fixture(scope="session")
def tiny_emulator(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emulator of ``tiny_model`` that holds out 12 calibration and 6 selection rows of ``rows_file``."""
    from support.jobs import compress_job

    from emloc_core.settings import CompressSettings

    settings = CompressSettings(samples=12, selection=6, ratio=0.6, calibration="base", allocator="uniform")
    output = tmp_path_factory.mktemp("tiny-emulator") / "emulator"
    return compress_job(tiny_model, rows_file, output, settings).run()


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
        process = subprocess.run(
            command,
            cwd=cwd,
            env={**environment, "EMLOC_STRICT_PLUGINS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The wheel of emloc, built from its source distribution, which is beside it; once for all workers of pytest."""
    base = tmp_path_factory.getbasetemp()
    directory = (base if worker_id == "master" else base.parent) / "wheel"
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(directory.glob("*.whl")):
            build = [sys.executable, "-m", "build", "--outdir", str(directory), str(ROOT)]
            process = subprocess.run(build, capture_output=True, text=True, check=False)
            assert process.returncode == 0, process.stdout + process.stderr
    (built,) = directory.glob("emloc-*.whl")
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
