"""Checks an installation: versions, GPU, memory, disk, caches, plugins. Works even if a dependency is broken.

It imports only the standard library; what may fail is tried in another process. ``python -m emloc_core.doctor`` does
the same without the command line's dependencies.
"""

import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from emloc_core.compat.tested import TESTED
from emloc_core.processes.group import within_group
from emloc_core.processes.lifetime import run_to_end
from emloc_core.units import human_bytes

#: Modules whose names differ from their packages'.
_MODULES = {"pillow": "PIL", "protobuf": "google.protobuf"}
#: Extras whose packages are for developers.
_DEVELOPMENT = {"bench", "demo", "dev", "docs"}
#: Time limit in seconds for what is tried in another process.
_PATIENCE = 300
#: Bytes below which there is hardly room for a model.
_LITTLE = 10 << 30

State = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        group: ``system``, ``packages``, ``gpu``, ``room`` or ``plugins``.
        state: ``error`` if EMLoC does not work like this, ``warning`` if it may not, ``note`` if it works without it.
        text: what was found, and what to do.
    """

    group: str
    name: str
    state: State
    text: str


def examine() -> list[Check]:
    """Check everything."""
    tried = probe([*(_module(name) for name, *_ in _required() if _installed(name)), "plugins", "products", "gpus"])
    gpus, products = tried.pop("gpus", {}), tried.pop("products", [])
    plugins = tried.pop("plugins", {})
    return [
        Check("system", "python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        *_processor(products),
        *_packages(tried),
        *_gpu(gpus),
        *_room(),
        *_plugins(plugins),
    ]


def _processor(slow: Any) -> Iterator[Check]:
    if isinstance(slow, str):
        yield Check("system", "processor", "error", f"its products cannot be timed: {slow}")
        return
    fast = " and ".join(dtype for dtype in ("float32", "bfloat16", "float16") if dtype not in slow)
    text = f"multiplies {fast} fast"
    if slow:
        text += f"; products in {' and '.join(slow)} are computed in single precision, which takes as long as float32"
    yield Check("system", "processor", "note" if "bfloat16" in slow else "ok", text)


def _required() -> Iterator[tuple[str, str, str | None]]:
    """Yield the packages that the installed EMLoC requires: name, least version, and extra."""
    names = set()
    for text in requires("emloc") or []:
        match = re.match(r"([\w.-]+)(\[[\w,]+\])?([^;]*)(?:;.*extra\s*==\s*.(\w+).)?", text)
        if match and not match[2] and match[1] not in names and match[4] not in _DEVELOPMENT:
            names.add(match[1])
            least = re.search(r">=\s*([\w.]+)", match[3])
            yield match[1].replace("_", "-"), least[1] if least else "0", match[4]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _module(name: str) -> str:
    """Return the name of a package's module."""
    return _MODULES.get(name, name.replace("-", "_"))


def _packages(tried: dict[str, Any]) -> Iterator[Check]:
    yield Check("packages", "emloc", "ok", version("emloc"))
    for name, least, extra in _required():
        installed = _installed(name)
        tested, private = TESTED.get(name, (None, ""))
        error = tried.get(_module(name))
        if installed is None:
            missing = f"not installed (to install it: pip install 'emloc[{extra}]')"
            yield Check(
                "packages", name, "note" if extra else "error", missing if extra else f"missing; needed: >= {least}"
            )
        elif error:
            yield Check("packages", name, "error", f"{installed} cannot be imported: {error}")
        elif _numbers(installed) < _numbers(least):
            yield Check("packages", name, "error", f"{installed} is too old; needed: >= {least}")
        elif tested and _numbers(installed)[: len(_numbers(tested))] > _numbers(tested):
            newer = f"{installed} is newer than what was tested (up to {tested}); it may have changed {private}"
            yield Check("packages", name, "warning", newer)
        else:
            yield Check(
                "packages", name, "ok", installed + (f" (needed: {least}, tested up to {tested})" if tested else "")
            )


def _numbers(text: str) -> list[int]:
    """Return the numbers of a version, without those of a local build or a release candidate."""
    return [int(part) for part in re.match(r"[\d.]*", text)[0].split(".") if part]  # type: ignore[index]


def _gpu(gpus: Any) -> Iterator[Check]:
    driver = _driver()
    if isinstance(gpus, str):  # torch does not even import, which is said already
        yield Check("gpu", "torch", "error", f"cannot query the GPUs: {gpus}")
        return
    for device in gpus.get("devices", []):
        size = f"{human_bytes(device['free'])} of {human_bytes(device['total'])} free"
        by = f"CUDA {gpus['cuda']}, driver {driver or 'unknown'}" if gpus.get("cuda") else gpus.get("type")
        yield Check("gpu", device["name"], "ok", f"{size}, {by}")
    if driver and not gpus.get("devices"):
        built = f"was built for CUDA {gpus['cuda']}" if gpus.get("cuda") else "was built for CPUs"
        yield Check("gpu", "cuda", "warning", f"the driver {driver} shows a GPU that torch cannot use: torch {built}")
    elif not gpus.get("devices"):
        yield Check("gpu", "cuda", "note", "no GPU; everything runs on the CPU")
    if not gpus.get("compiles", True):
        missing = "kernels cannot be compiled, so emulators take longer to make: install gcc and python3-dev"
        yield Check("gpu", "compiler", "warning", missing)


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, if there is a GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(process.stdout.split()), None)


def _room() -> Iterator[Check]:
    memory = _memory()
    if memory:
        free, total = memory
        yield Check("room", "memory", "ok", f"{human_bytes(free)} of {human_bytes(total)} free")
    cache = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    for name, path in (("disk here", Path.cwd()), ("models' cache", cache.expanduser())):
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        text = f"{path}: {human_bytes(free)} free"
        if not os.access(existing, os.W_OK):
            yield Check("room", name, "error", f"{text}, and it cannot be written to")
        elif free < _LITTLE:
            yield Check("room", name, "warning", f"{text}, which is little for a model")
        else:
            yield Check("room", name, "ok", text)
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Check("room", "hub", "note", "offline (HF_HUB_OFFLINE is set): only cached models can be used")


def _memory() -> tuple[int, int] | None:
    """Return the free and the total bytes of memory, within a container's limit; None if not on Linux."""
    try:
        if not Path("/proc/meminfo").exists():  # macOS, which tells only how much there is
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return total, total
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith("kB")}
        free, total = sizes["MemAvailable"], sizes["MemTotal"]
    except (OSError, LookupError, ValueError):
        return None
    return within_group(free, total)


def _plugins(reports: Any) -> Iterator[Check]:
    if isinstance(reports, str):
        yield Check("plugins", "all", "error", f"cannot be loaded: {reports}")
        return
    for report in reports:
        state: State = "error" if report["error"] else "ok"
        details = report["error"] or ", ".join(report["families"]) or "no families"
        yield Check("plugins", report["name"], state, f"{report['distribution']}: {details}")


def probe(names: Iterable[str]) -> dict[str, Any]:
    """Return what :func:`_probes` finds in another process; for a probe that ended it, how it ended.

    Args:
        names: modules to import, ``plugins``, ``products`` and ``gpus``.
    """
    waiting, answers = list(names), dict[str, Any]()
    while waiting:
        command = [sys.executable, "-m", "emloc_core.doctor", "--probe", *waiting]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
            output, how = process.stdout, f"the process ended with code {process.returncode}"
        except subprocess.TimeoutExpired as error:
            output, how = (error.stdout or b"").decode(), f"it took more than {_PATIENCE} seconds"
        for line in output.splitlines():
            if line.startswith('{"probed":'):
                answer = json.loads(line)
                answers[answer["probed"]] = answer["found"]
        remaining = [name for name in waiting if name not in answers]
        if remaining:
            answers[remaining[0]] = how
        waiting = remaining[1:]
    return answers


def _probes(names: Iterable[str]) -> None:
    """Try each name in this process, and print what was found: the error of a module's import, or None."""
    gc.disable()  # a fifth of the time of imports
    for name in names:
        answer: Any = None
        try:
            if name == "gpus":
                answer = _gpus()
            elif name == "products":
                from emloc_core.compat.halves import slow

                answer = sorted(str(dtype).removeprefix("torch.") for dtype in slow())
            elif name == "plugins":
                from emloc_core.plugins.manager import plugin_manager

                answer = [asdict(report) for report in plugin_manager().reports]
            else:
                import_module(name)
        except (Exception, SystemExit) as error:
            answer = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(json.dumps({"probed": name, "found": answer}), flush=True)  # noqa: T201 - the parent reads it


def _gpus() -> dict[str, Any]:
    import torch

    from emloc_core import devices
    from emloc_core.algorithms.feedback import compiles_kernels, takes_triton
    from emloc_core.algorithms.native import GRID, library

    gpus, here = [], devices.accelerator()
    for index in range(devices.count()):
        own = devices.interface(here or devices.CPU)
        free, total = own.mem_get_info(index)
        gpus.append({"name": own.get_device_name(index), "free": free, "total": total})
    compiles = compiles_kernels() if here and takes_triton(here) else library(GRID) is not None
    return {"cuda": torch.version.cuda, "type": here, "devices": gpus, "compiles": compiles}


def lines(checks: Iterable[Check]) -> Iterator[str]:
    """Yield the lines to print."""
    group = None
    for check in checks:
        if check.group != group:
            group = check.group
            yield group
        yield f"  {check.state:<8} {check.name}: {check.text}"


def is_healthy(checks: Iterable[Check]) -> bool:
    """Return whether no check is an error; notes and warnings are allowed."""
    return all(check.state != "error" for check in checks)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        run_to_end(lambda: _probes(sys.argv[2:]))
    else:
        checks = examine()
        print(*lines(checks), sep="\n")  # noqa: T201 - it is a command
        sys.exit(not is_healthy(checks))
