"""The control group of this process: how much memory it may take. Only cgroup v2 is read, as containers show it."""

from pathlib import Path

_PLACE = Path("/sys/fs/cgroup")


def group_memory() -> tuple[int, int] | None:
    """Return the bytes of memory that are free and that there are; None where there is no limit.

    Pages of files are free: the kernel keeps what was read until the memory is needed.
    """
    try:
        limit, used = (int((_PLACE / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        lines = (_PLACE / "memory.stat").read_text(encoding="ascii").splitlines()
        of = {name: int(size) for name, size in map(str.split, lines)}
        cached = of["active_file"] + of["inactive_file"]
    except (OSError, LookupError, ValueError):
        return None
    return max(0, limit - used + cached), limit
