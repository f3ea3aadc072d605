"""What a stage cost: seconds and peak memory of this process."""

import resource
import sys
import time
from typing import Any


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Measures from its creation on. Peak memory is that of the process, so one stage a process gives true figures."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def read(self) -> dict[str, Any]:
        """Return ``seconds``, ``peak_rss_bytes`` and, where a GPU was used, ``peak_cuda_bytes``."""
        reading: dict[str, Any] = {
            "seconds": round(time.perf_counter() - self._started, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            reading["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        return reading
