"""The cost of a stage: seconds and peak memory of this process."""

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from emloc_core import devices


def own_memory(kind: str) -> int | None:
    """Return a size of this process as Linux reports it, such as ``VmData``, in bytes; None elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{kind}:"):
                return int(line.split()[1]) << 10
    return None


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    if peak := own_memory("VmHWM"):  # ru_maxrss starts at the parent's peak; this is the program's own
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Measures from its creation. Peak memory is the whole process's, so run one stage per process for true figures."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def read(self) -> dict[str, Any]:
        """Return ``seconds`` and ``peak_rss_bytes``.

        If a GPU was used, also what tensors took at most, ``peak_gpu_bytes``, and what torch reserved for them,
        ``peak_gpu_reserved_bytes``; each of the GPU where it is largest.
        """
        reading: dict[str, Any] = {
            "seconds": round(time.perf_counter() - self._started, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        here = devices.accelerator() if "torch" in sys.modules else None
        own: Any = devices.interface(here) if here else None
        if hasattr(own, "max_memory_allocated") and own.is_initialized():
            gpus = range(own.device_count())
            if most := max(map(own.max_memory_allocated, gpus)):  # libraries initialise GPUs that nothing uses
                reading["peak_gpu_bytes"] = most
                reading["peak_gpu_reserved_bytes"] = max(map(own.max_memory_reserved, gpus))
        return reading


def peak_memory(timing: Mapping[str, Any]) -> int | None:
    """Return the peak that counts of what :meth:`Meter.read` returned: of the fullest GPU, or else of the process."""
    return timing.get("peak_gpu_bytes") or timing.get("peak_rss_bytes")
