"""Plans jobs: fingerprints, sizes, memory. In a separate process, because it imports torch.

The driver stays light, and a model that ends the planner ends nothing else.
"""

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError
from emloc_core.files.documents import write_json
from emloc_core.files.job import Progress
from emloc_core.processes.call import ProcessDiedError, call
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.task import Demand

#: What a stage writes besides weights (rows, tokenizer, logs, manifests), in bytes: a generous round figure.
_SIDE_FILES = 32 << 20


def plan(
    jobs: Sequence[ZooJob], cache_dir: Path, planned: Collection[str] = (), advance: Progress = lambda *_: None
) -> list[tuple[str, Demand | None]]:
    """Return the fingerprint of every job, and what it needs.

    Args:
        cache_dir: where hashes of large files are kept.
        planned: fingerprints whose needs are known; they are not planned again, and get None.
        advance: called with a job's name, how many are done, and how many there are.

    Raises:
        EmlocError: the planner itself broke.
    """
    if not jobs:
        return []
    plans: list[tuple[str, Demand | None]] = []
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if any(job.offline for job in jobs) else {}
    arguments = {
        "jobs": [job.model_dump(mode="json") for job in jobs],
        "cache_dir": str(cache_dir.absolute()),
        "planned": list(planned),
    }
    # An id of the hub is no path in that working directory.
    answers = call("emloc_core.zoo.jobs.planning:answers", arguments, environment=offline, cwd=cache_dir)
    try:
        for job, (fingerprint, needs) in zip(jobs, answers, strict=False):
            plans.append((fingerprint, Demand(**needs) if needs else None))
            advance(job.name, len(plans), len(jobs))
        next(answers, None)
    except ProcessDiedError as error:
        lost = jobs[min(len(plans), len(jobs) - 1)]
        raise EmlocError(
            f"Planning ended at {lost.name} ({lost.model}) with exit code {error.exit_code}.",
            "Its output says more; leave that model out, or free some memory.",
        ) from None
    return plans


def needs(job: ZooJob) -> Demand:
    """Return what a job needs on the CPU, by the memory plan; imports torch.

    disk: the emulator; its LoRA, twice, and the trainer's last two checkpoints with their optimiser states; as much
    for every other LoRA: polished, the upper bound of an evaluation, and the controls of polishing; the merged
    checkpoint; the model rewritten, where it has to be; and its download, unless the hub's cache has (part of) it.
    """
    from emloc_core.memory import streamed
    from emloc_core.memory.model import MemoryModel
    from emloc_core.memory.workload import make_workload
    from emloc_core.settings import TrainSettings

    train = job.train or TrainSettings()
    # What is on the hub is planned from the registry's config, where there is one, and without its tokenizer.
    data = job.data if Path(job.model).is_dir() and not job.layout else None
    with _config(job) as file:
        workload = make_workload(file, train, "cpu", length=job.compress.max_length, data=data, split=job.split)
        model = MemoryModel(file, workload, job.compress)
    plan = model.plan()
    base, emulator = model.parameters() * model.dtype.itemsize, model.emulator_bytes(plan)
    inference, tuning = model.inference().total, model.tuning(plan).total
    peaks, disk = [streamed.compress(model, plan).total], emulator + _SIDE_FILES + (base if job.layout else 0)
    disk += base if _is_fetched(job) else 0
    if job.train:
        peaks += [tuning, streamed.correct(model, plan, job.correct.clamp).total]
        compared = bool(job.eval and job.eval.full_lora)
        loras = 1 + compared
        if job.polish:
            rows = job.polish.batch_size * job.polish.accumulation
            peaks.append(streamed.exact(model, rows).total)
            loras += 1 + 2 * compared
        disk += loras * 4 * model.adapter_parameters() * (2 + 2 * 3) + _SIDE_FILES
        if job.merge:
            peaks.append(streamed.merge(model).total)
            disk += base
        if job.eval:
            peaks.append(inference)
            peaks += [model.tuning().total] if job.eval.full_lora else []
    return Demand(max(peaks), disk, base, emulator, inference, tuning)


@contextlib.contextmanager
def _config(job: ZooJob) -> Iterator[Path]:
    """Yield the ``config.json`` that a job's stages will read."""
    from emloc_core.files.checkpoint import Checkpoint
    from emloc_core.plugins.manager import plugin_manager
    from emloc_core.registry.registry import config_of

    if not Path(job.model).is_dir():
        with config_of(job.model.partition("@")[0]) as file:
            yield file
    elif job.layout:
        source = Checkpoint(job.model)
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "config.json"
            write_json(file, plugin_manager().layout_for(source.config).config(source.config, source.directory))
            yield file
    else:
        with config_of(job.model) as file:
            yield file


def _is_fetched(job: ZooJob) -> bool:
    """Say whether a job downloads its model. A model that is partly in the cache counts as there."""
    if job.offline or Path(job.model).exists():
        return False
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = job.model.partition("@")
    weights = "model.safetensors", "model.safetensors.index.json"
    return not any(isinstance(try_to_load_from_cache(name, file, revision=revision or None), str) for file in weights)


def answer(job: ZooJob, cache_dir: Path, planned: Collection[str]) -> tuple[str, Demand | None]:
    """Return the fingerprint of one job, and what it needs, as :func:`plan` does; imports torch."""
    try:
        fingerprint = job.fingerprint(cache_dir)
    except EmlocError as error:  # the worker will meet it too, and say so
        return f"{job.name}: {error}", Demand(reason=str(error))
    if fingerprint in planned:
        return fingerprint, None
    try:
        return fingerprint, needs(job)
    except Exception as error:
        return fingerprint, Demand(reason=str(error).strip() or type(error).__name__)


def answers(jobs: list[dict[str, Any]], cache_dir: str, planned: list[str]) -> Iterator[tuple[str, Any]]:
    """Answer several jobs in order, as JSON values: what :func:`plan` calls in a separate process."""
    for content in jobs:
        fingerprint, demand = answer(ZooJob(**content), Path(cache_dir), set(planned))
        yield fingerprint, demand and asdict(demand)
