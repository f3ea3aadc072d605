"""``python -m chaos``: run the campaign, print its table, and fail if anything is wrong or unexpected."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[threads] = "1"  # a fork has one
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import chaos.warm  # noqa: E402, F401 - before anything is computed
from chaos import hostile  # noqa: E402
from chaos.cases import Case  # noqa: E402
from chaos.changes import changing_inputs  # noqa: E402
from chaos.disks import full_disks  # noqa: E402
from chaos.kernel import is_supported  # noqa: E402
from chaos.kills import kills, kills_before_another, kills_twice, signals  # noqa: E402
from chaos.results import FAILED, Result, counts, markdown, write  # noqa: E402
from chaos.stages import STAGES, Bench, Stage  # noqa: E402
from chaos.writers import two_writers  # noqa: E402
from chaos.zoo import campaign  # noqa: E402

KINDS = {
    "kills": kills,
    "kills-twice": kills_twice,
    "kills-before-another": kills_before_another,
    "signals": signals,
    "disks": full_disks,
    "writers": two_writers,
    "changes": changing_inputs,
}
ZOOS, HOSTILE = "zoos", "hostile"  # which do not go by stages


def cases(bench: Bench, kinds: list[str], stages: list[Stage], most: int | None) -> Iterator[Case]:
    """Yield what there is to try."""
    for kind in kinds:
        for stage in stages:
            yield from KINDS[kind](bench, stage, most)


def results_of(bench: Bench, kinds: list[str], stages: list[Stage], arguments: argparse.Namespace) -> Iterator[Result]:
    """Yield what comes of all that is tried."""
    for case in cases(bench, [kind for kind in kinds if kind in KINDS], stages, arguments.most):
        yield case.result(bench)
    if ZOOS in kinds:
        with tempfile.TemporaryDirectory(prefix="emloc-zoos-") as directory:
            yield from campaign(Path(directory), seconds=arguments.zoo_seconds)
    if HOSTILE in kinds:
        with tempfile.TemporaryDirectory(prefix="emloc-hostile-") as directory:
            yield from hostile.campaign(Path(directory) / HOSTILE, arguments.most)


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--kind", action="append", choices=[*KINDS, ZOOS, HOSTILE], help="only that; repeatable")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only that; repeatable")
    parser.add_argument("--most", type=int, help="try at most so many moments of each kind and stage")
    parser.add_argument("--zoo-seconds", type=float, default=300, help="disturb zoos for so long")
    parser.add_argument("--json", type=Path, help="write the counts and what failed there")
    arguments = parser.parse_args()
    if not is_supported():
        sys.exit("The kernel cannot tell what a process does to files: Linux 5.9 with seccomp is needed.")
    kinds = arguments.kind or [*KINDS, ZOOS, HOSTILE]
    results: list[Result] = []
    start = time.monotonic()
    in_memory = Path("/dev/shm")  # where there is one: thousands of fsyncs
    place = in_memory if os.access(in_memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="emloc-chaos-", dir=place) as directory:
        bench = Bench(Path(directory))
        stages = [STAGES[name] for name in arguments.stage or STAGES]
        for result in results_of(bench, kinds, stages, arguments):
            results.append(result)
            if result.verdict in FAILED:
                print(f"{result.verdict}: {result.kind}: {result.case}: {result.why}", file=sys.stderr, flush=True)
    print(markdown(counts(results)))
    print(f"{len(results)} cases in {time.monotonic() - start:.0f} s", file=sys.stderr)
    if arguments.json:
        write(arguments.json, results)
    return int(any(result.verdict in FAILED for result in results))


if __name__ == "__main__":
    sys.exit(main())
