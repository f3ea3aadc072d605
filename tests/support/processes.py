"""Shared by the tests of the zoo: jobs that only wait, drivers, plans without a planner, and finding workers."""

import os
import subprocess
import sys
import textwrap
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

from emloc_core.zoo.convert import convert
from emloc_core.zoo.engines.local import LocalEngine
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.planning import answer
from emloc_core.zoo.jobs.task import Demand
from emloc_core.zoo.retry import Limits
from emloc_core.zoo.state.store import Store

#: Converts jobs that only wait: zoo, workers, then NAME=SECONDS.
DRIVER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from support.processes import wait, waiting
    wait(Path(sys.argv[1]), [waiting(*text.split("=")) for text in sys.argv[3:]], workers=int(sys.argv[2]))
"""


class WaitingEngine(LocalEngine):
    """Workers that only wait."""

    command = (sys.executable, str(Path(__file__).with_name("waiter.py")))


def waiting(name, seconds=0):
    return ZooJob(name=name, model=f"none/{name}", data=str(seconds))


def plan_here(jobs, cache_dir, planned=(), _=None):
    """Plan as the planner does, but in this process, which has imported already what takes that one seconds."""
    return [answer(job, cache_dir, planned) for job in jobs]


#: Makes conversions and dry runs of this process plan in it.
planning_here = partial(patch, "emloc_core.zoo.convert.plan", plan_here)


def drive(zoo, jobs, *, workers=2, engine=LocalEngine, tell=lambda *_: None, memory=None, **limits):
    """Plan here and convert; return the records by name."""
    limits.setdefault("backoff", 0.01)
    with planning_here():
        records = convert(jobs, zoo, lambda lock: engine(workers, memory, [lock]), Limits(**limits), tell)
    return {record.job.name: record for record in records}


def wait(zoo, jobs, *, engine=WaitingEngine, **options):
    """Drive jobs that only wait; they are in the store with their plan, so that there is nothing to plan."""
    names = [job.name for job in jobs]
    with closing(Store(zoo, create=True)) as store:
        store.add(jobs, names)
        store.plan(dict.fromkeys(names, Demand(memory=0, disk=0)))
    return drive(zoo, [], engine=engine, **options)


def driver(zoo, jobs, workers=2):
    """Start a driver in a process of its own; ``jobs`` are seconds by name."""
    script = textwrap.dedent(DRIVER.format(tests=str(Path(__file__).parents[1])))
    arguments = [f"{name}={seconds}" for name, seconds in jobs.items()]
    return subprocess.Popen([sys.executable, "-c", script, str(zoo), str(workers), *arguments])


def workers_of(zoo, name):
    """Return the processes, the worker and its stage, that do a job now: those whose directory is its outputs'."""
    home = (zoo / "jobs" / name).resolve()
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if (process / "cwd").readlink() == home:
                pids.append(int(process.name))
    return sorted(pids)


def until(condition, seconds=300.0):
    """Wait for what must come; return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.005)
    return value


def is_gone(process):
    """Say whether a process has ended (a zombie that nobody has waited for has)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def files(directory):
    """Return the contents of a directory by name, with what tells a file that was written again."""
    return {
        path.name: (path.read_bytes(), os.stat(path).st_ino, os.stat(path).st_mtime_ns)
        for path in directory.iterdir()
        if path.is_file()
    }
