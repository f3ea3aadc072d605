"""Packs what a GPU machine that reaches no registry lacks, as wheels in build/gpu-wheels, and says how to install it.

    python benchmarks/gpu_wheels.py [--python 3.12] [--cuda 130] [--there NAME...]

Versions are those of this environment. The machine is taken to have :data:`THERE`. Of bitsandbytes' libraries, which
take 400 MB, the one for the machine's CUDA travels alone.
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
PLACE = ROOT / "build" / "gpu-wheels"
#: What an image for PyTorch has, and is large; so it has what these need.
THERE = ("torch", "torchvision", "triton", "numpy", "scipy", "scikit-learn", "pandas", "pyarrow", "matplotlib",
         "pillow", "lxml", "aiohttp", "hf-xet", "regex", "pyyaml", "setuptools")  # fmt: skip
#: What the tests and benchmarks of a GPU need; and what builds the checkout, in an environment of its own.
NEEDED, BUILDS = ("emloc[vision]", "pytest", "hypothesis"), ("hatchling", "editables")
INSTALL = "python -m pip install --no-index --find-links build/gpu-wheels --editable '.[vision]' pytest hypothesis"
MOST = 64_000_000  # bytes that such a machine may be given, with the checkout


def requirements(python: str, there: Iterable[str]) -> list[str]:
    """Return what is needed and not there, and what it needs in turn, as pip reads it, in the versions of here."""
    machine: Any = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    found: dict[str, str] = {}
    has = {canonicalize_name(name) for name in there}
    left, seen = [Requirement(name) for name in NEEDED], set[tuple[str, ...]]()
    while left:
        each = left.pop()
        name = canonicalize_name(each.name)
        if name in has or (name, *each.extras) in seen:
            continue
        seen.add((name, *each.extras))
        known = distribution(name)
        found[name] = f"{name}=={known.version}"
        for further in map(Requirement, known.requires or []):
            extras = ("", *each.extras)
            if not further.marker or any(further.marker.evaluate({**machine, "extra": of}) for of in extras):
                left.append(further)
    del found["emloc"]  # which is the checkout
    return list(found.values())


def fetch(wanted: Sequence[str], python: str) -> None:
    """Get wheels for a Python on Linux. One that serves every Python is built where there is no file of it."""
    everywhere = [each for each in wanted if "-none-any" in (distribution(each.split("=")[0]).read_text("WHEEL") or "")]
    compiled = [each for each in wanted if each not in everywhere]
    tags = [f"manylinux_2_{minor}" for minor in (34, 31, 28, 27, 26, 24, 17, 12, 5)] + ["manylinux2014", "manylinux1"]
    platforms = [option for tag in tags for option in ("--platform", f"{tag}_{platform.machine()}")]
    others = ["--only-binary=:all:", "--python-version", python, *platforms]
    for how in (
        ["wheel", "--wheel-dir", str(PLACE), *BUILDS],
        ["wheel", "--wheel-dir", str(PLACE), "--no-deps", *everywhere],
        ["download", "--dest", str(PLACE), "--no-deps", *others, *compiled],
    ):
        if subprocess.run([sys.executable, "-m", "pip", *how, "--quiet"], check=False).returncode:
            sys.exit("pip did not get all wheels; see above.")


def with_one_library(wheel: Path, kept: str) -> None:
    """Leave only one of bitsandbytes' libraries for a GPU in its wheel."""

    def stays(name: str) -> bool:
        return kept in name or "/libbitsandbytes_" not in name or "_cpu" in name

    smaller = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as given, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as made:
        if not any(kept in name for name in given.namelist()):
            sys.exit(f"{wheel.name} has no library {kept}. Give the machine's --cuda, 128 say.")
        for name in filter(stays, given.namelist()):
            content = given.read(name)
            if name.endswith("/RECORD"):
                content = b"".join(line for line in content.splitlines(keepends=True) if stays(line.decode()))
            made.writestr(given.getinfo(name), content, zipfile.ZIP_DEFLATED)
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
    given = parser.parse_args()
    shutil.rmtree(PLACE, ignore_errors=True)
    wanted = requirements(given.python, [*THERE, *given.there])
    fetch(wanted, given.python)
    for wheel in PLACE.glob("bitsandbytes-*.whl"):
        with_one_library(wheel, f"_cuda{given.cuda}.so")
    sizes = {wheel.name: wheel.stat().st_size for wheel in PLACE.iterdir()}
    whole = sum(sizes.values()) + checkout_bytes()
    told = f"{len(sizes)} wheels, {sum(sizes.values()) / 1e6:.1f} MB, {whole / 1e6:.1f} with the checkout"
    if whole > MOST:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
        named = ", ".join(f"{name} ({sizes[name] / 1e6:.1f})" for name in largest)
        sys.exit(
            f"{told}: more than {MOST / 1e6:.0f}. Name with --there what the machine has; the largest are {named}."
        )
    print(f"{told}. In the checkout on the machine:\n\n    {INSTALL}")


if __name__ == "__main__":
    main()
