"""Does one job: ``python -m emloc_core.zoo.engines.worker JOB.json``. Outputs and outcome appear beside the file.

Each stage is a separate process, forked before anything heavy is imported: its memory is released, its peak is its
own, and the worker survives whatever kills it, and reports how it ended.
"""

import contextlib
import os
import signal
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

from emloc_core.errors import EmlocError
from emloc_core.files.documents import write_json
from emloc_core.files.workspace import Workspace
from emloc_core.processes.environment import hush_libraries
from emloc_core.processes.lifetime import die_with, end_with_parent
from emloc_core.recipe.stages import Stage
from emloc_core.zoo.jobs.faults import classify, describe, ended, memory_kills
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.outcome import OUTCOME, Outcome, collect, read_outcome


def run(job: ZooJob, directory: Path) -> Outcome:
    """Do the job's stages in order, except those that are done already; return how it ended."""
    if job.data is None:
        return Outcome("bad input", f"{job.name} has no rows to calibrate on. Give --data, or data of its own.")
    stage = None
    try:
        for stage in job.stages(directory):
            outcome = _run_stage(stage, directory / OUTCOME, offline=job.offline)
            if outcome.cause is not None:
                return outcome
        return Outcome(None, result=collect(job, directory))
    except Exception as error:
        return _failure(error, stage, offline=job.offline)


def _run_stage(stage: Stage, file: Path, *, offline: bool) -> Outcome:
    """Run a stage in a process, which writes its outcome to ``file`` if it fails."""
    file.unlink(missing_ok=True)
    print(f"{stage.request.stage}: {stage.purpose}", flush=True)  # noqa: T201 - the log
    kills, worker = memory_kills(), os.getpid()
    child = os.fork()
    if child == 0:
        # Whatever happens, this process must not return into the worker's loop.
        try:
            die_with(worker, signal.SIGKILL)
            code = _in_process(stage, file, offline=offline)
        finally:
            os._exit(locals().get("code", 1))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        return Outcome(None)
    process = f"The process of the stage '{stage.name}'"
    return read_outcome(file.parent) or replace(ended(code, kills, process), stage=stage.name)


def _in_process(stage: Stage, file: Path, *, offline: bool) -> int:
    try:
        from emloc_core.stages.perform import perform

        perform(stage.request)
    except BaseException as error:
        outcome = _failure(error, stage, offline=offline)
        with contextlib.suppress(OSError):
            write_json(file, asdict(outcome))
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
    return 0


def _failure(error: BaseException, stage: Stage | None, *, offline: bool) -> Outcome:
    """Return the outcome of an exception; if the disk is full, remove what the stage has written."""
    cause = classify(error, offline=offline)
    if cause == "disk" and stage:
        with contextlib.suppress(OSError):
            Workspace(stage.output).discard()
    with contextlib.suppress(OSError):
        if isinstance(error, EmlocError):
            print(f"emloc: error: {error}", file=sys.stderr, flush=True)  # noqa: T201 - the log
        else:
            traceback.print_exception(error)
    return Outcome(cause, describe(error), stage.name if stage else "")


def _end_all(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler's signature
    """End the worker's whole group: the stage, and what it has started."""
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main(job_file: str) -> int:
    """Do the job in ``job_file``, write its outcome beside it, and return the exit code."""
    if os.getpgid(0) == os.getpid():  # started by an engine, as the leader of its group
        signal.signal(signal.SIGTERM, _end_all)
        end_with_parent(signal.SIGTERM)
    hush_libraries()
    path = Path(job_file).absolute()
    outcome = run(ZooJob.model_validate_json(path.read_text(encoding="utf-8")), path.parent)
    with contextlib.suppress(OSError):
        write_json(path.with_name(OUTCOME), asdict(outcome))
    return int(outcome.cause is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
