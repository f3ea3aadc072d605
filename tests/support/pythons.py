"""The built wheel on each Python that EMLoC supports: ``make test-pythons``.

For every version whose interpreter is on this machine: a fresh environment with the wheel and what it needs, ``emloc
--help``, ``emloc doctor``, and the tests that are named below, which see the wheel and not the checkout. Versions that
are missing are named and skipped.
"""

import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

from support.paths import ROOT

DIRECTORY = ROOT / "build" / "pythons"
#: Files, rows, settings, plugins, and the contracts with libraries.
TESTS = ["test_errors.py", "test_units.py", "algorithms", "adapters/test_adapter.py", "data", "files/test_files.py",
         "plugins/test_plugins.py", "recipe/test_recipe.py", "compat"]  # fmt: skip


def supported() -> list[str]:
    """Return the versions that the package declares, such as ``3.12``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = (name.rpartition(" ")[2] for name in project["classifiers"] if "Python :: 3." in name)
    return list(versions)


def interpreter(version: str) -> str | None:
    """Return the path of an interpreter of a version, from the path or from pyenv; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]:
        if (
            candidate
            and subprocess.run([candidate, "-c", "import venv"], capture_output=True, check=False).returncode == 0
        ):
            return str(candidate)
    return None


def failures(version: str, python: str, wheel: Path) -> Iterator[str]:
    """Install the wheel for one version, and yield the names of the commands that fail."""
    environment = DIRECTORY / version
    uv = [sys.executable, "-m", "uv"]
    packages = [f"{wheel}[vision]", "pytest>=8.4", "hypothesis>=6.130"]
    steps = {
        "install": [*uv, "pip", "install", "--quiet", "--python", str(environment), *packages],
        "--help": [str(environment / "bin" / "emloc"), "--help"],
        "doctor": [str(environment / "bin" / "emloc"), "doctor"],
        "tests": [str(environment / "bin" / "pytest"), *(str(ROOT / "tests" / name) for name in TESTS)],
    }
    subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", python, str(environment)], check=True)
    for name, command in steps.items():
        start = time.monotonic()
        process = subprocess.run(command, cwd=DIRECTORY, capture_output=True, text=True, check=False)
        print(f"{version} {name}: {'ok' if process.returncode == 0 else 'FAILED'}, {time.monotonic() - start:.0f} s")
        if name == "tests" or process.returncode:
            print("\n".join((process.stdout + process.stderr).splitlines()[-12:]))
        if process.returncode:
            yield f"{version} {name}"
            if name == "install":
                return


def main() -> None:
    """Test the versions that are given, or all."""
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(DIRECTORY), str(ROOT)],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    (wheel,) = DIRECTORY.glob("*.whl")
    failed: list[str] = []
    for version in sys.argv[1:] or supported():
        python = interpreter(version)
        if python is None:
            print(f"{version}: skipped, for no interpreter of it was found")
            continue
        failed += failures(version, python, wheel)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
