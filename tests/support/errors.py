"""The errors of an emulator's Linears, measured on the inputs that they have there."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from emloc_core.files.manifest import read_manifest
from emloc_core.model.hooks import forward_hooks


def require_reported_errors(base, emulator, samples, model, linear=str):
    """Compare the errors that an emulator reports with those on samples.

    ``model`` is the emulator, loaded, maybe with a LoRA; ``linear`` returns where it has the Linear of a path.
    """
    reported = {row["path"]: row["relative_error"] for row in read_manifest(emulator)["result"]["linears"]}
    exact = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    lost, total = dict.fromkeys(reported, 0.0), dict.fromkeys(reported, 0.0)

    def compare(path):
        weight = exact.get_submodule(path).weight

        def note(_module, args, output):
            target = args[0] @ weight.T
            lost[path] += float((output - target).square().sum())
            total[path] += float(target.square().sum())

        return note

    with torch.no_grad(), forward_hooks((model.get_submodule(linear(path)), compare(path)) for path in reported):
        for sample in samples:
            model(**sample.inputs("cpu"))
    assert reported
    for path, error in reported.items():
        assert error == pytest.approx((lost[path] / total[path]) ** 0.5, rel=1e-3), path
