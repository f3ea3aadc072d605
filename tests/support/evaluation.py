"""Systems evaluated in the process of the test, and the loss by plain torch."""

from pathlib import Path

import torch
from support.rows import example_rows

from emloc_core.evaluation.evaluate import Evaluate, read_results
from emloc_core.evaluation.loading import load_system
from emloc_core.evaluation.system import run_tasks
from emloc_core.evaluation.tasks import find_task, load_task
from emloc_core.files.inputs import Inputs
from emloc_core.requests import System, make_request


def metrics_of(model_directory, task, adapter=None, **settings):
    spec = find_task(str(task), Inputs())
    model, processing = load_system(Path(model_directory), adapter, images=spec.shows_images)
    report = run_tasks(model, processing, load_task(spec), **settings)
    return report["tasks"][spec.name], report["samples"]


def direct_nll(model, pairs):
    """Mean loss per token of the second ids of each pair, after the first: plain torch, a row at a time."""
    total, count = 0.0, 0
    for context, target in pairs:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + target])).logits[0, len(context) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum").item()
        count += len(target)
    return total / count


def completions(tokenizer, n):
    for row in example_rows()[:n]:
        ids, context = tokenizer.encode(row["prompt"] + row["completion"]), tokenizer.encode(row["prompt"])
        yield context, ids[len(context) :]


def system(name, model, adapter=None):
    return System(name=name, model=str(model), adapter=adapter)


def evaluate(systems, tasks, output, **options):
    """Compare systems; return the results in their order."""
    request = make_request("eval", systems=tuple(systems), tasks=tuple(tasks), output=output, **options)
    return read_results(Evaluate(request).run(), [system.name for system in systems])
