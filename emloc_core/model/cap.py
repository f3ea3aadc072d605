"""A cap on memory, beyond which allocations fail: a plan for a small GPU can be proven on a large one.

``EMLOC_MEMORY_CAP=cuda=24GiB,cpu=8GiB`` names what a process may take of every GPU, and of the CPU's memory. In a run
with a set memory, that is the GPU cap of its stages. Any name but ``cpu`` stands for the accelerator that is here.
"""

import os
import resource
import sys

from emloc_core import devices
from emloc_core.errors import EmlocError
from emloc_core.files.meter import own_memory
from emloc_core.model.overhead import overhead
from emloc_core.settings import FREE
from emloc_core.units import human_bytes, parse_bytes

CAP = "EMLOC_MEMORY_CAP"


def gpu_cap(memory: str | None) -> dict[str, str]:
    """Return the environment that caps processes at this much of a GPU, unless this process has a cap of its own.

    ``free`` and None set no cap.
    """
    return {} if memory in (None, FREE) else {CAP: os.environ.get(CAP) or f"cuda={memory}"}


def keep_to_cap() -> None:
    """Have allocations beyond the cap fail from now on.

    Raises:
        EmlocError: the cap is not as it should be, or the process already uses more.
    """
    for device, nbytes in _caps().items():
        if devices.is_accelerator(device):
            cap_gpus(nbytes)
        else:
            _cap_process(nbytes)


def cap_gpus(nbytes: int) -> None:
    """Have torch allocate at most so many bytes of any GPU, the driver's context included.

    Of processes that were launched together, each caps only its own GPU: to cap another would make a context there.

    Raises:
        EmlocError: the context alone takes as much.
    """
    here = devices.accelerator()
    if here is None:
        return
    own = devices.interface(here)
    if not hasattr(own, "set_per_process_memory_fraction"):
        raise EmlocError(
            f"torch cannot cap the memory of {here!r}.",
            f"Leave it out of {CAP}, or take --device cpu.",
            code="unsupported",
        )
    room = nbytes - overhead(here, tuning=True)
    if room <= 0:
        raise _too_small(nbytes, nbytes - room)
    launched = os.environ.get("LOCAL_RANK")
    for gpu in range(own.device_count()) if launched is None else [int(launched)]:
        total = own.get_device_properties(gpu).total_memory
        with own.device(gpu):  # which torch would make the current one for good
            own.set_per_process_memory_fraction(min(1.0, room / total), gpu)


def cap_sentence() -> str:
    """Return a sentence about the cap, with a space before it, for errors; nothing where there is none."""
    cap = os.environ.get(CAP)
    return f" {CAP} is {cap}." if cap else ""


def _cap_process(nbytes: int) -> None:
    """Limit the process to so many bytes of data (heap, and mappings without a file), beyond which the kernel refuses.

    It counts what is asked for, touched or not; so what libraries have asked for but not yet touched is added.
    """
    if sys.platform != "linux":
        raise EmlocError(f"{CAP} caps CPU memory only on Linux.", "Name only an accelerator.", code="unsupported")
    resident, data = own_memory("VmRSS") or 0, own_memory("VmData") or 0
    if resident >= nbytes:  # Python itself would fail anywhere
        raise _too_small(nbytes, resident)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes - resident + data, hard))


def _caps() -> dict[str, int]:
    """Return the cap of every device that has one, in bytes."""
    caps = {}
    for part in filter(None, os.environ.get(CAP, "").split(",")):
        device, separator, size = part.partition("=")
        if not separator:
            raise EmlocError(f"{CAP} names no memory of {device!r}.", f"Write it as {CAP}=cuda=24GiB,cpu=8GiB.")
        caps[devices.type_of(device)] = parse_bytes(size)
    return caps


def _too_small(nbytes: int, used: int) -> EmlocError:
    message = (
        f"A cap of {human_bytes(nbytes)} is less than the {human_bytes(used)} that the process has before its work."
    )
    return EmlocError(message, f"Raise it in {CAP}.", code="memory", resumable=True)
