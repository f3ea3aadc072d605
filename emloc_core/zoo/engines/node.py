"""Runs a job's worker on a node of a cluster: in the zoo itself, or in a directory that is uploaded afterwards.

On a disk that all nodes share there is nothing to copy: stages publish complete directories by renaming them, and
another node resumes what a lost one left. Other storage gets each output when it is finished.
"""

import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from emloc_core import __version__
from emloc_core.errors import EmlocError
from emloc_core.zoo.engines.engine import Worker
from emloc_core.zoo.engines.storage import Storage, fetch_input, input_name
from emloc_core.zoo.jobs.job import BYTES, ZooJob
from emloc_core.zoo.jobs.outcome import Outcome
from emloc_core.zoo.jobs.task import JOB, JOBS, write_job
from emloc_core.zoo.state.lock import try_lock

_LOCK = ".worker.lock"
_PATIENCE = 20.0  # seconds within which the worker of a lost attempt must have ended
#: Causes after which the same job is not retried unchanged, so that its files here would only take room.
_OVER = {None, "bad input", "disk", "out of memory"}
_LOOK, _MIRROR = 0.05, 2.0  # seconds between looks at the worker, and between copies of its log


@dataclass(frozen=True)
class Order:
    """What a node has to do, as plain values that can be sent to it.

    Attributes:
        zoo: directory of the zoo, for nodes that share the disk.
        log: path in the zoo, or in the storage.
        storage: URL of the storage; None for the zoo on a shared disk.
        inputs: names in the storage of the files that the job reads, by path.
        version: the driver's version of the toolkit.
    """

    job: str
    zoo: str
    log: str
    storage: str | None
    inputs: dict[str, str]
    version: str = __version__


def perform(order: Order) -> dict[str, Any]:
    """Do a job on this machine; return its outcome as JSON values.

    The worker ends when this process does, however it ends.

    Raises:
        OSError: files or storage failed.
    """
    host = socket.gethostname()
    if order.version != __version__:
        message = f"{host} has emloc {__version__} and the driver {order.version}: install the same one everywhere."
        return asdict(Outcome("bad input", message, host=host))
    job = ZooJob.model_validate_json(order.job)
    outcome = _on_shared_disk(order, job) if order.storage is None else _by_storage(order, job)
    return asdict(replace(outcome, host=host))


def _on_shared_disk(order: Order, job: ZooJob) -> Outcome:
    directory, log = Path(order.zoo) / JOBS / job.name, Path(order.zoo) / order.log
    try:
        visible = ZooJob.model_validate_json((directory / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        visible = None
    if visible != job:
        host = socket.gethostname()
        message = f"{host} does not see what the driver wrote to {directory}. Share that disk, or use --storage."
        return Outcome("input/output", message)
    with _alone(directory) as lock:
        if lock is None:
            return _BUSY
        worker = Worker(job, directory, log, [lock])
        try:
            while (outcome := worker.outcome()) is None:
                time.sleep(_LOOK)
            return outcome
        finally:
            worker.end()


def _by_storage(order: Order, job: ZooJob) -> Outcome:
    assert order.storage is not None
    storage = Storage(order.storage)
    # Another attempt at the same job on this node resumes what is there.
    key = hashlib.sha256(f"{order.storage}\0{order.job}".encode()).hexdigest()[:24]
    directory = _own_directory() / key
    directory.mkdir(exist_ok=True)
    with _alone(directory) as lock:
        if lock is None:
            return _BUSY
        local = _with_inputs(job, order.inputs, storage, directory)
        outputs = {directory / stage: name for stage, name in output_names(job, order.inputs).items()}
        for output, name in outputs.items():
            if not output.exists() and storage.has(name):
                storage.fetch(name, output)
        write_job(local, directory)
        log = directory / "log"
        worker = Worker(local, directory, log, [lock])
        mirrored = 0.0
        try:
            while (outcome := worker.outcome()) is None:
                time.sleep(_LOOK)
                if time.monotonic() - mirrored > _MIRROR:
                    with suppress(OSError):  # the next look, or the end, makes up for it
                        _publish(storage, outputs)
                        storage.write(order.log, log.read_bytes())
                    mirrored = time.monotonic()
            _publish(storage, outputs)
        finally:
            worker.end()
            with suppress(OSError):  # no log is worth an attempt
                storage.write(order.log, log.read_bytes())
        if outcome.cause in _OVER:
            shutil.rmtree(directory)
        return outcome


def _own_directory() -> Path:
    """Return a directory for temporary files that no other user can write to.

    Raises:
        EmlocError: another user has made it.
    """
    directory = Path(tempfile.gettempdir()) / f"emloc-zoo-{os.getuid()}"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if directory.lstat().st_uid != os.getuid():
        raise EmlocError(f"{directory} belongs to another user.", "Set TMPDIR on that node to a directory of your own.")
    return directory


def output_names(job: ZooJob, inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the names in the storage of a job's outputs, by stage, in order: ``jobs/NAME/STAGE-HASH``.

    The hash covers everything that led to the output: another job of the same name has other outputs, and a job that
    was made smaller for a later stage keeps the outputs of the earlier ones.
    """
    digest = hashlib.sha256(repr((BYTES, job.threads, sorted(inputs.items()))).encode())
    names = {}
    for stage in job.stages(Path()):
        digest.update(repr((stage.request.stage, stage.request.model_dump_json())).encode())
        names[stage.name] = f"{JOBS}/{job.name}/{stage.name}-{digest.hexdigest()[:12]}"
    return names


def _publish(storage: Storage, outputs: dict[Path, str]) -> None:
    """Copy the finished outputs to the storage. A stage's directory appears when it is finished."""
    for output, name in outputs.items():
        if output.is_dir() and not storage.has(name):
            storage.publish(output, name)


def _with_inputs(job: ZooJob, inputs: dict[str, str], storage: Storage, directory: Path) -> ZooJob:
    """Return the job with its inputs fetched from the storage, unless this machine has the same files."""

    def local_path(path: str | None) -> str | None:
        if path is None or path not in inputs or _is_here(Path(path), inputs[path]):
            return path
        return str(fetch_input(storage, inputs[path], directory))

    changes = {name: local_path(getattr(job, name)) for name in ("model", "data")}
    return job.model_copy(update={**changes, "test": [local_path(path) for path in job.test]})


def _is_here(path: Path, name: str) -> bool:
    return path.exists() and input_name(path) == name


_BUSY = Outcome("input/output", "The worker of an earlier attempt is still running.")


@contextmanager
def _alone(directory: Path) -> Iterator[int | None]:
    """Lock a directory against other workers of the same job; yield a file descriptor, or None if one is at work."""
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not try_lock(descriptor):
            if time.monotonic() > deadline:
                yield None
                return
            time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)
