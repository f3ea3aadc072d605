"""Packs what a GPU machine that reaches no registry lacks, as wheels in build/gpu-wheels, and says how to install it.

    python benchmarks/gpu_wheels.py [--python 3.12] [--cuda 130] [--there NAME...]

Versions are this environment's. The machine is assumed to have :data:`PREINSTALLED`. Of bitsandbytes' libraries,
400 MB, only the one for the machine's CUDA is packed.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DIRECTORY = ROOT / "build" / "gpu-wheels"
#: Large packages that an image for PyTorch has, and with them what they need.
PREINSTALLED = ("torch", "torchvision", "triton", "numpy", "scipy", "scikit-learn", "pandas", "pyarrow", "matplotlib",
                "pillow", "lxml", "aiohttp", "hf-xet", "regex", "pyyaml", "setuptools")  # fmt: skip
#: What the tests and benchmarks of a GPU need; and what builds the checkout, in an environment of its own.
NEEDED, BUILDS = ("emloc[vision]", "pytest", "hypothesis"), ("hatchling", "editables")
INSTALL = "python -m pip install --no-index --find-links build/gpu-wheels --editable '.[vision]' pytest hypothesis"
MOST = 64_000_000  # bytes that such a machine may be given, with the checkout


def requirements(python: str, available: Iterable[str]) -> list[str]:
    """Return the requirements of what is missing, with its dependencies, pinned to this environment's versions."""
    machine: Any = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    pins: dict[str, str] = {}
    available_names = {canonicalize_name(name) for name in available}
    queue, visited = [Requirement(name) for name in NEEDED], set[tuple[str, ...]]()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in available_names or (name, *requirement.extras) in visited:
            continue
        visited.add((name, *requirement.extras))
        package = distribution(name)
        pins[name] = f"{name}=={package.version}"
        for further in map(Requirement, package.requires or []):
            extras = ("", *requirement.extras)
            if not further.marker or any(further.marker.evaluate({**machine, "extra": extra}) for extra in extras):
                queue.append(further)
    del pins["emloc"]  # the checkout itself
    return list(pins.values())


def fetch(pins: Sequence[str], python: str) -> None:
    """Get wheels for a Python on Linux. One for every Python is built where none is published."""
    everywhere = [pin for pin in pins if "-none-any" in (distribution(pin.split("=")[0]).read_text("WHEEL") or "")]
    compiled = [pin for pin in pins if pin not in everywhere]
    tags = [f"manylinux_2_{minor}" for minor in (34, 31, 28, 27, 26, 24, 17, 12, 5)] + ["manylinux2014", "manylinux1"]
    platforms = [option for tag in tags for option in ("--platform", f"{tag}_{platform.machine()}")]
    others = ["--only-binary=:all:", "--python-version", python, *platforms]
    for arguments in (
        ["wheel", "--wheel-dir", str(DIRECTORY), *BUILDS],
        ["wheel", "--wheel-dir", str(DIRECTORY), "--no-deps", *everywhere],
        ["download", "--dest", str(DIRECTORY), "--no-deps", *others, *compiled],
    ):
        if subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet"], check=False).returncode:
            sys.exit("pip did not get all wheels; see above.")


def with_one_library(wheel: Path, library: str) -> None:
    """Leave only one of bitsandbytes' libraries for a GPU in its wheel."""

    def is_kept(name: str) -> bool:
        return library in name or "/libbitsandbytes_" not in name or "_cpu" in name

    smaller = wheel.with_suffix(".new")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target,
    ):
        if not any(library in name for name in source.namelist()):
            sys.exit(f"{wheel.name} has no library {library}. Give the machine's --cuda, 128 say.")
        for name in filter(is_kept, source.namelist()):
            content = source.read(name)
            if name.endswith("/RECORD"):
                content = b"".join(line for line in content.splitlines(keepends=True) if is_kept(line.decode()))
            target.writestr(source.getinfo(name), content, zipfile.ZIP_DEFLATED)
    smaller.replace(wheel)


def checkout_bytes() -> int:
    """Return the size of the files that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return sum((ROOT / name).stat().st_size for name in listed.stdout.decode().split("\0") if name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ours = ".".join(platform.python_version_tuple()[:2])
    parser.add_argument("--python", default=ours, help="The machine's Python.  [default: this one, %(default)s]")
    parser.add_argument("--cuda", default="130", help="The CUDA of the machine's torch.  [default: %(default)s]")
    parser.add_argument(
        "--there", nargs="*", default=[], metavar="NAME", help="Packages that it has, beside the usual."
    )
    options = parser.parse_args()
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    pins = requirements(options.python, [*PREINSTALLED, *options.there])
    fetch(pins, options.python)
    for wheel in DIRECTORY.glob("bitsandbytes-*.whl"):
        with_one_library(wheel, f"_cuda{options.cuda}.so")
    sizes = {wheel.name: wheel.stat().st_size for wheel in DIRECTORY.iterdir()}
    total = sum(sizes.values()) + checkout_bytes()
    summary = f"{len(sizes)} wheels, {sum(sizes.values()) / 1e6:.1f} MB, {total / 1e6:.1f} with the checkout"
    if total > MOST:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
        listing = ", ".join(f"{name} ({sizes[name] / 1e6:.1f})" for name in largest)
        sys.exit(
            f"{summary}: more than {MOST / 1e6:.0f}. Name with --there what the machine has; the largest are {listing}."
        )
    print(f"{summary}. In the checkout on the machine:\n\n    {INSTALL}")


if __name__ == "__main__":
    main()
