"""What tensors take of the CPU's memory at the peak, LAPACK's workspaces among them, as torch's profiler sees it."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_of(work: Callable[[], Any]) -> int:
    """Return the bytes that a function holds at its peak, of those that it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))
