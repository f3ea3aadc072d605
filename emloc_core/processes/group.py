"""The control group of this process: how much memory it may take. Only cgroup v2 is read, as containers show it."""

from pathlib import Path

_PLACE = Path("/sys/fs/cgroup")


def within_group(free: int, total: int) -> tuple[int, int]:
    """Return the bytes of memory that are free and that there are, of a machine's, to the processes of this group.

    Pages of files are free: the kernel keeps what was read until the memory is needed.
    """
    try:
        limit, used = (int((_PLACE / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        lines = (_PLACE / "memory.stat").read_text(encoding="ascii").splitlines()
        of = {name: int(size) for name, size in map(str.split, lines)}
        cached = of["active_file"] + of["inactive_file"]
    except (OSError, LookupError, ValueError):  # there is none, or it has no limit
        return free, total
    return min(free, max(0, limit - used + cached)), min(total, limit)
