"""Code shared by the commands: running a stage with progress, and printing its result."""

import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import announce, print_json, print_table, progress
from emloc_core.cli.following import following
from emloc_core.cli.verbosity import Verbosity, set_up_libraries, showing_families, verbosity
from emloc_core.files.hub import check_repository
from emloc_core.files.hub import push as upload
from emloc_core.files.manifest import MANIFEST
from emloc_core.processes.environment import without_collections
from emloc_core.report.verdict import verdict
from emloc_core.requests import EvaluateRequest, Request, request_from_json
from emloc_core.stages.progress import Reporter
from emloc_core.stages.result import Result
from emloc_core.units import counted, human_bytes, human_seconds

if TYPE_CHECKING:
    from emloc_core.files.job import Job

_DOING = {
    "import": "Importing",
    "compress": "Compressing",
    "train": "Training",
    "correct": "Correcting",
    "polish": "Polishing",
    "merge": "Merging",
    "export": "Exporting",
    "eval": "Evaluating",
}
_CALIBRATIONS = {
    "propagated": "on the activations of the emulator so far",
    "base": "on the activations of the base",
    "none": "not needed",
}


def run(request: Request, *, dry_run: bool, to_json: bool, push: str | None = None) -> None:
    """Run a stage, or print what it would do, with the result on stdout."""
    job = _prepare(request, push)
    if dry_run:
        content = job.describe()
        if to_json:
            print_json(content)
        else:
            for line in _planned(request.stage, content):
                click.echo(line)
        return
    result = _finish(request, job, to_json=to_json)
    if result is None:
        return
    if push is not None:
        click.echo(f"Uploaded: {upload(result, push)}", err=True)
    if not to_json and verbosity() is not Verbosity.QUIET:
        for index, command in enumerate(following(request, result)):
            click.echo(f"{'Or' if index else 'Next'}: {command}")


def perform(request: str, tell: Callable[[dict[str, Any]], Any]) -> str:
    """Run a stage of a recipe in its own process, with progress on stderr.

    Args:
        tell: called with each :class:`~emloc_core.stages.progress.ProgressEvent` as JSON values.
    """
    parsed = request_from_json(request)
    reporter = Reporter(parsed.stage, parsed.output, lambda event: tell(asdict(event)))
    with showing_families():
        _finish(parsed, _prepare(parsed), reporter)
    return "done"


@without_collections()
def _prepare(request: Request, push: str | None = None) -> "Job":
    from emloc_core.stages.perform import prepare

    if push is not None:
        check_repository(push)
    set_up_libraries(on_terminal=sys.stderr.isatty())
    job = prepare(request)
    for warning in job.warnings:
        click.echo(f"warning: {warning}.", err=True)
    gc.freeze()  # modules and rows stay until the end: later collections can skip them
    return job


def _finish(
    request: Request, job: "Job", reporter: Reporter | None = None, *, to_json: bool = False
) -> Result[Any] | None:
    """Run a job with progress on stderr, and print its result; in a recipe (with a reporter), not when quiet."""
    from emloc_core.stages.perform import finish

    made_before = (request.output / MANIFEST).is_file()
    # Libraries print; stdout is for the result.
    with progress(_DOING[request.stage]) as shown, redirect_stdout(sys.stderr):

        def advance(*report: Any) -> None:
            shown(*report)
            if reporter:
                reporter(*report)

        result = finish(request.stage, job, advance)
    if result is None or (reporter and verbosity() is Verbosity.QUIET):
        return result
    if isinstance(request, EvaluateRequest) and not (reporter or to_json or verbosity() is Verbosity.QUIET):
        _print_scores(request, result)
    announce(result, summary(request, result), to_json=to_json, made_before=made_before)
    return result


def _planned(stage: str, content: Mapping[str, Any]) -> Iterable[str]:
    """Return lines that say what a stage would do."""
    if stage == "compress":
        yield f"{content['base']}: family {content['family']}, {human_bytes(content['base_bytes'])}"
        ranks = sum(linear["reason"] is None for linear in content["linears"])
        yield f"emulator: {human_bytes(content['emulator_bytes'])}; {ranks} Linears become:"
        yield from (f"  {line}" for line in content["summary"])
        if content["ranks_by_spectra"]:
            yield "  (distributed evenly; calibration will redistribute the same size by need)"
        yield (
            f"rows: {content['calibration_rows']} calibration ({content['calibration_tokens']:,} tokens), "
            f"{content['selection_rows']} selection, {content['tuning_rows']} left for tuning"
        )
        yield f"calibration: {_CALIBRATIONS[content['calibration']]}"
    elif stage in ("train", "polish"):
        yield f"{content['model']}: family {content['family']}, {human_bytes(content['model_bytes'])}"
        yield f"rows: {content['rows']} to train on, {content['excluded_rows']} left out"
        if evaluated := content["eval_rows"]:
            yield f"{counted(evaluated, 'row')} to evaluate"
        yield from _lengths(content)
        steps, targets = counted(content["steps"], "step"), ", ".join(content["target_modules"])
        yield f"{steps} at a learning rate of {content['learning_rate']:g}; LoRA on {targets}"
        if content.get("second_moments") is False:
            yield "the adapter has no second moments of its tuning: the better it is, the lower the rate should be"
        if step_bytes := content.get("step_read_bytes"):
            yield f"weights read per step, every block twice: {human_bytes(step_bytes)}"
    elif stage == "eval":
        for name, system in content["systems"].items():
            yield f"{name:<16} {system['model']}" + (f" + {system['adapter']}" if system["adapter"] else "")
        for name, path in content["tasks"].items():
            yield f"{'task':<16} {name} ({path})"
    else:
        for key, value in content.items():
            yield f"{key.replace('_', ' ')}: {human_bytes(value) if 'bytes' in key else value}"


def _lengths(content: Mapping[str, Any]) -> Iterable[str]:
    yield f"longest row: {content['longest_tokens']:,} tokens ({content['longest_row']})"
    if cut := content["cut_rows"]:
        dropped = f"{content['dropped_rows']} of them dropped, with no answer left"
        yield f"cut to the maximum length: {counted(cut, 'row')}, {dropped}"
    if copies := content["duplicate_rows"]:
        yield f"duplicates: {copies} {'row repeats' if copies == 1 else 'rows repeat'} the content of an earlier one"


def summary(request: Request, result: Result) -> list[str]:
    """Return the lines to print for a finished stage."""
    content = result.result
    if request.stage == "compress":
        return _errors(content, result.manifest["request"]["settings"].get("calibration"))
    if request.stage in ("train", "polish"):
        loss = content["train_loss"]  # unknown if training stopped early, before a loss was logged
        mean = "" if loss is None else f"mean loss {loss:.4f}, "
        lines = [
            f"{counted(content['steps'], 'step')} on {counted(content['rows'], 'row')} "
            f"({content['excluded_rows']} left out): {mean}{content['trainable_parameters']:,} trainable parameters"
        ]
        if (best := content.get("best_step")) is not None:
            kept = f"the best checkpoint, of step {best}" if best else "the adapter as it was: no step improved it"
            on_base = f", {content['eval_base_loss']:.4f} on the base" if "eval_base_loss" in content else ""
            rows = counted(content["eval_rows"], "held-out row")
            lines.append(f"kept {kept}; loss {content['eval_loss']:.4f} on {rows}{on_base}")
        if content["dropped_rows"]:
            lines.append(f"{counted(content['dropped_rows'], 'row')} dropped: the maximum length leaves no completion")
        if read_bytes := result.timing.get("read_bytes"):
            waited = human_seconds(result.timing["waited_seconds"])
            lines.append(f"{human_bytes(read_bytes)} of weights read; the steps waited {waited} for them")
        return lines
    if request.stage == "correct":
        return [
            f"LoRA on {counted(content['linears'], 'Linear')}: {verdict(content)}",
            *map(_candidate, content.get("candidates", [])),
        ]
    return _written(request.stage, content)


def _candidate(row: Mapping[str, Any]) -> str:
    """Return the line for a candidate of the correction."""
    rows = counted(row["rows"], "held-out row")
    line = f"  clamp {row['clamp']!s:<5} scale {row['scale']:<5g} nll {row['nll']:.4f} on {rows}"
    if (row["clamp"], row["scale"]) == (0, 1):
        return f"{line} (uncorrected)"
    error = row.get("gain_stderr")  # unknown for a single row
    return f"{line}, {row['gain']:+.3f} ± {2 * error:.3f} nats gained per row" if error else line


def _written(stage: str, content: Mapping[str, Any]) -> list[str]:
    """Return the lines for a stage that rewrites a model or an adapter."""
    if stage == "merge":
        return [f"{counted(content['merged_linears'], 'Linear')} merged into {human_bytes(content['bytes'])}"]
    if stage == "export":
        subject = (
            f"{counted(content['linears'], 'LoRA')} of rank {content['rank']}" if "linears" in content else "the model"
        )
        count = f" in {counted(content['tensors'], 'tensor')} of GGUF" if "tensors" in content else ""
        return [f"{subject}{count}", *(f"warning: {text}" for text in content.get("warnings", []))]
    if stage == "import":
        return [
            f"{content['layout']} to {content['model_type']}: {human_bytes(content['bytes'])}, {content['split']} split"
        ]
    return []


def _print_scores(request: EvaluateRequest, result: Result) -> None:
    from emloc_core.evaluation.evaluate import read_results
    from emloc_core.report import table

    results = read_results(result.path, [system.name for system in request.systems])
    print_table(table.table(results["systems"], results["metrics"]))
    for line in filter(None, (table.note(results), table.conclusion(results))):
        click.echo(line)


def _errors(content: Mapping[str, Any], calibration: str | None) -> list[str]:
    """Return lines with the relative errors of a finished emulator, per kind of Linear."""
    from emloc_core.report.error_plot import finite, strips

    errors = [
        (strip, values)
        for strip in strips({linear["path"]: linear["relative_error"] for linear in content["linears"]})
        if (values := finite(strip.values))
    ]
    names = _short_names(list(dict.fromkeys(strip.tower for strip, _ in errors)))
    kinds = [(f"{names[strip.tower]} {strip.label}".strip(), values) for strip, values in errors]
    measure = "error of the weights" if calibration == "none" else "output error on the calibration rows"
    lines = [f"relative {measure} (mean, worst):"]
    width = max((len(kind) for kind, _ in kinds), default=0)
    lines += [f"  {kind:<{width}} {sum(values) / len(values):.3f}  {max(values):.3f}" for kind, values in kinds]
    lines.append(
        f"base {human_bytes(content['bytes']['base'])} -> emulator {human_bytes(content['bytes']['emulator'])}"
    )
    return lines


def _short_names(towers: Sequence[str]) -> dict[str, str]:
    """Return the first part in which the towers' paths differ; empty strings if there is only one tower."""
    parts = [tower.split(".") for tower in towers]
    common = next((index for index, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1), None)
    if len(towers) < 2 or common is None:
        return dict.fromkeys(towers, "")
    return {tower: path[common] for tower, path in zip(towers, parts, strict=True)}
