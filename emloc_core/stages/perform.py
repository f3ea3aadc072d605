"""Runs a stage, from its request to its finished output. Every caller goes through here."""

import logging
from pkgutil import resolve_name
from typing import Any

from emloc_core.errors import EmlocError, first_line, is_out_of_memory
from emloc_core.files.job import Job, Progress
from emloc_core.model.cap import cap_sentence, keep_to_cap
from emloc_core.processes.environment import without_collections
from emloc_core.requests import Request, request_from_json
from emloc_core.stages.precheck import precheck
from emloc_core.stages.result import Result

#: Makes the job of a request, by stage. Imported on demand: stages need torch.
_JOBS = {
    "import": "emloc_core.model.importing:Import",
    "compress": "emloc_core.memory.decision:prepare",
    "train": "emloc_core.tuning.exact:prepare",
    "correct": "emloc_core.adapters.correct:prepare",
    "polish": "emloc_core.tuning.exact:prepare",
    "merge": "emloc_core.adapters.merge:Merge",
    "export": "emloc_core.serving.export:Export",
    "eval": "emloc_core.evaluation.evaluate:Evaluate",
}


_LOGGER = logging.getLogger("emloc.stages")


def prepare(request: Request) -> Job:
    """Return the job of a request.

    Raises:
        EmlocError: the request cannot be met; nothing has been written.
    """
    precheck(request)
    with without_collections():
        make = resolve_name(_JOBS[request.stage])
    return make(request)


def describe(request: str) -> dict[str, Any]:
    """Return what the stage of a request, which is JSON, would do."""
    return prepare(request_from_json(request)).describe()


def finish(stage: str, job: Job, progress: Progress | None = lambda *_: None) -> Result[Any] | None:
    """Run a job and notify the plugins that observe stages.

    Args:
        progress: called with every item that is done; for training, None lets the trainer show its own bar.

    Returns:
        The output; None in all processes but the main one, which writes it.

    Raises:
        EmlocError: the stage failed. If the error is resumable, the same request resumes.
    """
    _LOGGER.info("%s starts", stage)
    keep_to_cap()
    try:
        directory = job.run(progress)
    except Exception as error:
        if isinstance(error, EmlocError) or not is_out_of_memory(error):
            raise
        raise EmlocError(
            f"Out of memory ({first_line(error)}).{cap_sentence()}",
            "Free memory and run the same command again to resume. Another --device, or fewer or shorter rows, need "
            "another --output.",
            code="memory",
            resumable=True,
        ) from error
    if not job.is_main_process:
        return None
    result: Result[Any] = Result(directory)
    _LOGGER.info("%s is done: %s", stage, directory)
    from emloc_core.plugins.manager import plugin_manager

    plugin_manager().notify("emloc_stage_done", stage=stage, output=directory, manifest=result.manifest)
    return result


def perform(request: Request, progress: Progress | None = lambda *_: None) -> Result[Any] | None:
    """Prepare and run a request; see :func:`prepare` and :func:`finish`."""
    return finish(request.stage, prepare(request), progress)
