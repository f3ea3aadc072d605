"""The outcome of an attempt at a job, which a worker leaves beside the job file, and the result of a finished one."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json, read_object
from emloc_core.files.manifest import MANIFEST
from emloc_core.files.output import TIMING
from emloc_core.zoo.jobs.job import ZooJob

Cause = Literal[
    "out of memory", "input/output", "bad input", "time limit", "disk", "crash", "lost worker", "interrupted"
]
OUTCOME = "result.json"
#: The fields of each of an emulator's Linears that the result keeps.
_LINEAR = ("path", "rank", "in_features", "out_features", "relative_error", "reason")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        cause: why it failed; None for a success.
        message: what happened and where, for a person.
        stage: the output that was being made, where known: ``emulator``, ``adapter``, ...
        result: what a success made; see :func:`collect`.
    """

    cause: Cause | None
    message: str = ""
    stage: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    host: str = ""


def read_outcome(directory: Path) -> Outcome | None:
    """Return the outcome that a worker wrote, or None if it wrote nothing."""
    with suppress(EmlocError, TypeError):
        return Outcome(**read_object(directory / OUTCOME))
    return None


def collect(job: ZooJob, directory: Path) -> dict[str, Any]:
    """Return the result of a job whose stages are all finished.

    Returns:
        ``kind`` of emulator; ``ratio``, None if the kind has none; ``bytes``: of ``base`` and ``emulator``;
        ``parameters``: of the compressed Linears before and after; ``linears``: path, rank, shape and relative error
        of each; ``stages``: by output, ``seconds``, ``peak_rss_bytes``, and ``peak_gpu_bytes`` on a GPU;
        ``seconds``: of all stages. Where there are such stages, ``loss``: the mean of tuning; ``correction``: what
        correcting decided; and ``systems`` and ``metrics``: as in ``results.json`` of ``emloc eval``.
    """
    outputs = [stage.output for stage in job.stages(directory)]
    timings = {output.name: read_json(output / TIMING) for output in outputs}
    manifest = read_json(directory / "emulator" / MANIFEST)
    request, emulator = manifest["request"], manifest["result"]
    result: dict[str, Any] = {
        "kind": request["settings"]["kind"],
        "ratio": request["settings"]["ratio"],
        "family": emulator["family"],
        "bytes": emulator["bytes"],
        "parameters": emulator["parameters"],
        "linears": [{key: linear.get(key) for key in _LINEAR} for linear in emulator["linears"]],
        "stages": timings,
        "seconds": round(sum(timing["seconds"] for timing in timings.values()), 3),
    }
    if "adapter" in timings:
        result["loss"] = read_json(directory / "adapter" / MANIFEST)["result"]["train_loss"]
    if "corrected" in timings:
        result["correction"] = read_json(directory / "corrected" / MANIFEST)["result"]
    if "evaluation" in timings:
        evaluation = read_json(directory / "evaluation" / "results.json")
        result.update({key: evaluation[key] for key in ("systems", "metrics")})
    return result
