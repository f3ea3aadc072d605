"""The control group of this process: how much memory it may take. Only cgroup v2 is read, as containers show it."""

from pathlib import Path

_DIRECTORY = Path("/sys/fs/cgroup")


def within_group(free: int, total: int) -> tuple[int, int]:
    """Return the bytes of memory that are free and in total, of a machine's, for the processes of this group.

    Pages of files are free: the kernel keeps what was read until the memory is needed.
    """
    try:
        limit, used = (
            int((_DIRECTORY / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current")
        )
        lines = (_DIRECTORY / "memory.stat").read_text(encoding="ascii").splitlines()
        stats = {name: int(size) for name, size in map(str.split, lines)}
        cached = stats["active_file"] + stats["inactive_file"]
    except (OSError, LookupError, ValueError):  # there is no group, or it has no limit
        return free, total
    return min(free, max(0, limit - used + cached)), min(total, limit)
