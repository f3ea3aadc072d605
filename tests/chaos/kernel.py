"""Follows a process's changes to files, reported by the kernel just before each happens.

A seccomp filter with a listener (seccomp_unotify(2), Linux 5.9) holds a thread at each system call that changes a file
until the supervisor has said: continue, or fail with this error. It covers all threads and children, in any language.
"""

import ctypes
import errno
import fcntl
import os
import platform
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ARCHITECTURES = {"x86_64": 0, "aarch64": 1}
#: name -> (number on x86_64, on aarch64, which arguments say where: ``d`` directory, ``p`` path, ``f`` file).
_CALLS = {
    "open": (2, None, {"p": 0}),
    "openat": (257, 56, {"d": 0, "p": 1}),
    "creat": (85, None, {"p": 0}),
    "write": (1, 64, {"f": 0}),
    "pwrite64": (18, 68, {"f": 0}),
    "writev": (20, 66, {"f": 0}),
    "sendfile": (40, 71, {"f": 0}),
    "copy_file_range": (326, 285, {"f": 2}),
    "ftruncate": (77, 46, {"f": 0}),
    "truncate": (76, 45, {"p": 0}),
    "fallocate": (285, 47, {"f": 0}),
    "fsync": (74, 82, {"f": 0}),
    "fdatasync": (75, 83, {"f": 0}),
    "flock": (73, 32, {"f": 0}),
    "rename": (82, None, {"p": 1}),
    "renameat": (264, 38, {"d": 2, "p": 3}),
    "renameat2": (316, 276, {"d": 2, "p": 3}),
    "unlink": (87, None, {"p": 0}),
    "unlinkat": (263, 35, {"d": 0, "p": 1}),
    "rmdir": (84, None, {"p": 0}),
    "mkdir": (83, None, {"p": 0}),
    "mkdirat": (258, 34, {"d": 0, "p": 1}),
    "link": (86, None, {"p": 1}),
    "linkat": (265, 37, {"d": 2, "p": 3}),
    "symlink": (88, None, {"p": 1}),
    "symlinkat": (266, 36, {"d": 1, "p": 2}),
    "statfs": (137, 43, {"p": 0}),
}
#: The index of the argument with the flags that say whether anything is to be written.
_FLAGS = {"open": 1, "openat": 2}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
#: The call that asks how much room there is; it changes nothing.
ASKS_FOR_ROOM = "statfs"

_AT_FDCWD = 0xFFFFFF9C
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER, _NEW_LISTENER, _NO_NEW_PRIVS = 1, 8, 38
_NOTIFY, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # the ioctls of the listener
_CONTINUE = 1
_LOAD, _EQUAL, _ANY_OF, _RETURN = 0x20, 0x15, 0x45, 0x06  # of classic BPF


@dataclass(frozen=True)
class Call:
    """A system call that is about to be made.

    Attributes:
        name: of the call.
        path: of the file or directory that it changes; of a rename, its new name.
        source: of a rename or link, its old name.
        process: the thread that makes it.
    """

    name: str
    path: Path
    process: int
    identity: int
    arguments: tuple[int, ...]
    source: Path | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.path.name}"


def is_supported() -> bool:
    """Say whether this kernel reports what processes do to files."""
    try:
        actions = Path("/proc/sys/kernel/seccomp/actions_avail").read_text(encoding="utf-8")
    except OSError:
        return False
    return platform.machine() in _ARCHITECTURES and "user_notif" in actions.split()


def _numbers() -> dict[str, int]:
    column = _ARCHITECTURES[platform.machine()]
    numbers = {name: entry[column] for name, entry in _CALLS.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _filter() -> bytes:
    """Return the program that selects those calls: reads, and writes to stdout or stderr, are let through."""
    parts = []
    for name, number in _numbers().items():
        if name in _FLAGS:
            body = [(_LOAD, 0, 0, 16 + 8 * _FLAGS[name]), (_ANY_OF, 0, 1, _WRITES), (_RETURN, 0, 0, _NOTIFY)]
        elif name in ("write", "writev"):
            body = [(_LOAD, 0, 0, 16), (_EQUAL, 2, 0, 1), (_EQUAL, 1, 0, 2), (_RETURN, 0, 0, _NOTIFY)]
        else:
            body = [(_RETURN, 0, 0, _NOTIFY)]
        body += [(_RETURN, 0, 0, _ALLOW)]
        parts += [(_LOAD, 0, 0, 0), (_EQUAL, 0, len(body), number), *body]
    parts.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *part) for part in parts)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def watch_this_process() -> int:
    """Hold this process, and all that it starts, at each such call from now on; return the listener's descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    listener = libc.syscall(_SECCOMP[platform.machine()], _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(program))
    if listener < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return listener


class Listener:
    """The supervisor's end."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._names = {number: name for name, number in _numbers().items()}

    def receive(self) -> Call | None:
        """Return a call that waits for an answer; None where its thread has ended meanwhile."""
        message = bytearray(80)
        try:
            fcntl.ioctl(self.descriptor, _RECEIVE, message)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return None
            raise
        identity, process, _, number, _, _, *arguments = struct.unpack("QIIiIQ6Q", message)
        name = self._names[number]
        positions = _CALLS[name][2]
        try:
            path = _path(process, positions, arguments)
            old = {letter: index - (2 if "d" in positions else 1) for letter, index in positions.items()}
            source = _path(process, old, arguments) if name.startswith(("rename", "link")) else None
        except OSError:  # it was killed
            path, source = Path("/"), None
        return Call(name, path, process, identity, tuple(arguments), source)

    def answer(self, call: Call, error: int | None = None) -> None:
        """Let a call continue, or make it fail with an ``errno``; 0: say that it has succeeded, and do not make it."""
        failed = error is not None
        message = struct.pack("QqiI", call.identity, 0, -(error or 0), 0 if failed else _CONTINUE)
        with suppress(FileNotFoundError):  # its thread has ended, or a signal has interrupted it: it asks again
            fcntl.ioctl(self.descriptor, _SEND, bytearray(message))


def say_full(call: Call) -> None:
    """Answer ``statfs`` like a file system without room, by writing to the caller's memory."""
    size, blocks, kind = 4096, 1 << 20, 0x01021994
    answer = struct.pack("15Q", kind, size, blocks, 0, 0, 1 << 20, 1 << 19, 0, 255, size, 0, 0, 0, 0, 0)
    with open(f"/proc/{call.process}/mem", "r+b", buffering=0) as memory:
        memory.seek(call.arguments[1])
        memory.write(answer)


def _path(process: int, positions: dict[str, int], arguments: list[int]) -> Path:
    if "f" in positions:
        return Path(os.readlink(f"/proc/{process}/fd/{arguments[positions['f']]}"))
    text = _string(process, arguments[positions["p"]])
    directory = arguments[positions["d"]] & 0xFFFFFFFF if "d" in positions else _AT_FDCWD
    start = f"/proc/{process}/cwd" if directory == _AT_FDCWD else f"/proc/{process}/fd/{directory}"
    return Path(os.path.normpath(text if text.startswith("/") else f"{os.readlink(start)}/{text}"))


def _string(process: int, address: int) -> str:
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        content = b""
        while b"\0" not in content:
            part = memory.read(4096 - (address + len(content)) % 4096)  # up to the end of the page
            if not part:
                break
            content += part
    return os.fsdecode(content.partition(b"\0")[0])
