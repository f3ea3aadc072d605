"""``python -m chaos``: run the campaign, print its table, and fail if anything is wrong or unexpected."""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[threads] = "1"  # a fork has one
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from support import warm  # noqa: E402, F401 - before anything is computed

from chaos import hostile, zoo  # noqa: E402
from chaos.cases import Case  # noqa: E402
from chaos.changes import changing_inputs  # noqa: E402
from chaos.disks import full_disks  # noqa: E402
from chaos.kernel import is_supported  # noqa: E402
from chaos.kills import kills, kills_before_another, kills_twice, signals  # noqa: E402
from chaos.results import FAILED, Result, counts, markdown, write  # noqa: E402
from chaos.stages import STAGES, Bench, Stage  # noqa: E402
from chaos.syncs import syncs  # noqa: E402
from chaos.writers import two_writers  # noqa: E402

#: name -> cases of a stage, and at how many moments at most each is tried; None: before every call.
KINDS: dict[str, tuple[Callable[[Bench, Stage, int | None], Iterator[Case]], int | None]] = {
    "kills": (kills, None),
    "kills-twice": (kills_twice, 5),
    "kills-before-another": (kills_before_another, None),
    "syncs": (syncs, 1),
    "signals": (signals, 8),
    "disks": (full_disks, 25),
    "writers": (two_writers, 8),
    "changes": (changing_inputs, 4),
}
#: Campaigns that make their own inputs.
OTHERS: dict[str, Callable[[Path, argparse.Namespace], Iterable[Result]]] = {
    "hostile": lambda directory, arguments: hostile.campaign(directory / "hostile", arguments.sample or arguments.most),
    "zoos": lambda directory, arguments: zoo.campaign(directory, seconds=arguments.zoo_seconds),
}
#: Stages of several seconds, and at how many moments at most they are disturbed: the stages in them are above.
SLOW = {"eval": 12, "run": 12}


def cases(bench: Bench, kinds: list[str], stages: list[str], most: int | None) -> Iterator[Case]:
    """Yield the cases of these kinds and stages."""
    for kind in kinds:
        make_cases, limit = KINDS[kind]
        for stage in stages:
            limits = [number for number in (limit, most, SLOW.get(stage)) if number is not None]
            yield from make_cases(bench, STAGES[stage], min(limits, default=None))


def attempt(directory: Path, arguments: argparse.Namespace, part: int) -> list[Result]:
    """Try every ``arguments.jobs``-th case on a bench of its own."""
    bench = Bench(directory / f"bench-{part}")
    chosen = list(cases(bench, [kind for kind in arguments.kind if kind in KINDS], arguments.stage, arguments.most))
    if arguments.sample:
        chosen = random.Random(arguments.sample).sample(chosen, min(arguments.sample, len(chosen)))
    return report(case.result(bench) for case in chosen[part :: arguments.jobs])


def report(results: Iterable[Result]) -> list[Result]:
    """Collect the results, and print at once what failed."""
    collected = []
    for result in results:
        collected.append(result)
        if result.verdict in FAILED:
            print(result, file=sys.stderr, flush=True)
    return collected


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--kind", action="append", choices=[*KINDS, *OTHERS], help="only that; repeatable")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only that; repeatable")
    parser.add_argument("--most", type=int, help="try at most so many moments of each kind and stage")
    parser.add_argument("--sample", type=int, help="try so many cases, drawn at random")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cases")
    parser.add_argument("--zoo-seconds", type=float, default=300, help="disturb zoos for so long")
    parser.add_argument("--json", type=Path, help="write the counts and what failed there")
    arguments = parser.parse_args()
    if not is_supported():
        sys.exit("The kernel cannot tell what a process does to files: Linux 5.9 with seccomp is needed.")
    arguments.kind = arguments.kind or [*KINDS, *OTHERS]
    arguments.stage = arguments.stage or list(STAGES)
    start = time.monotonic()
    in_memory = Path("/dev/shm")  # where there is one: thousands of files are synced
    with (
        tempfile.TemporaryDirectory(prefix="emloc-chaos-", dir=in_memory if in_memory.is_dir() else None) as directory,
        ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("fork")) as pool,
    ):
        parts = [pool.submit(attempt, Path(directory), arguments, part) for part in range(arguments.jobs)]
        results = [result for part in parts for result in part.result()]
    for kind in [kind for kind in OTHERS if kind in arguments.kind]:
        with tempfile.TemporaryDirectory(prefix="emloc-chaos-") as directory:
            results += report(OTHERS[kind](Path(directory), arguments))
    print(markdown(counts(results)))
    print(f"{len(results)} cases in {time.monotonic() - start:.0f} s", file=sys.stderr)
    if arguments.json:
        write(arguments.json, results)
    return int(any(result.verdict in FAILED for result in results))


if __name__ == "__main__":
    sys.exit(main())
