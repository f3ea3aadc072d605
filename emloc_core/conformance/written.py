"""Checks of what the stages write: emulator, adapter, corrected adapter, merged checkpoint, memory plan."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from emloc_core.adapters.adapter import Adapter
from emloc_core.conformance.activations import before_the_end, deviation, statistics, tolerated
from emloc_core.conformance.check import check, require
from emloc_core.conformance.forward import logits
from emloc_core.conformance.tiny import TinyModel, trial_of
from emloc_core.conformance.tuning import STEPS
from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_object
from emloc_core.files.lora import WEIGHTS
from emloc_core.files.manifest import MANIFEST
from emloc_core.files.pretrained import load_lora
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import Workload
from emloc_core.plugins.manager import TOKENS
from emloc_core.standins.transposed import as_linears
from emloc_core.standins.vocabulary import PackedLayer

#: A kind of emulator whose weights no code but its own layers' can read.
PACKED = "low-rank-nf4"
#: How far two computations of one fp32 weight or activation may differ: relative to the largest number, and absolute.
RELATIVE, ABSOLUTE = 1e-5, 1e-6


@check(statistics)
def packed(subject: TinyModel) -> str | None:
    """An emulator with packed weights gives the same output with these weights unpacked."""
    try:
        directory = subject.emulator_of(PACKED, allocator="uniform", calibration="base")  # the quickest
    except EmlocError as error:
        return f"There is no emulator of the kind {PACKED}: {error.args[0]}"
    model = subject.load(directory)
    answers = [logits(model, sample) for sample in subject.samples]
    model = trial_of(subject.family).unpacked(model)
    apart = [deviation(answer, logits(model, sample)) for answer, sample in zip(answers, subject.samples, strict=True)]
    allowed = tolerated(subject, apart)
    require(
        [f"unpacked, the emulator answers differently, by {value:.1e} of the largest logit" for value in apart
         if not value <= allowed],
        "Some module uses the weight of a Linear, or its dtype, without calling it: list that Linear in keep_dense.",
    )  # fmt: skip
    return None


@check(statistics)
def trains(subject: TinyModel) -> str:
    """The emulator is written, loads by plain from_pretrained, and a LoRA on it learns in every Linear it is put on."""
    tuned = subject.tuned
    rows = read_object(subject.emulator / MANIFEST)["result"]["linears"]
    dense = {row["path"] for row in rows if row["reason"] is not None}
    require(
        [f"{linear.path} stayed dense" for linear in subject.plan.candidates if linear.path in dense],
        "Make the tiny config's layers larger, or, if factors can never be smaller than this weight, list it in "
        "keep_dense.",
    )
    require(
        [f"{path}, a {kind}, got a LoRA, which belongs on Linears alone" for path, kind in tuned.odd.items()],
        "Name the targets in lora_targets by more of their paths: PEFT takes every module whose path ends so.",
    )
    losses = tuned.losses
    require(
        [f"the loss at step {step + 1} is {loss}" for step, loss in enumerate(losses) if not math.isfinite(loss)],
        "Correct the sizes of the tiny config.",
    )
    require(
        [f"the LoRA on {path} got no gradient" for path in before_the_end(subject, tuned.untouched)],
        "Leave it out of lora_targets: what it computes does not reach the loss, or no row reaches it.",
    )
    return f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps."


@check(trains)
def adapter_keys(subject: TinyModel) -> None:
    """The adapter that was trained on the emulator loads on the base by plain PEFT: no key is missing or left over."""
    trained = load_file(subject.adapter / WEIGHTS)
    loaded = get_peft_model_state_dict(_on_base(subject, subject.adapter), save_embedding_layers=False)
    problems = [f"the base has no place for {key}" for key in sorted(trained.keys() - loaded.keys())]
    problems += [f"the adapter lacks {key}, which the base has" for key in sorted(loaded.keys() - trained.keys())]
    problems += [
        f"{key} was not loaded" for key in sorted(trained.keys() & loaded.keys())
        if not torch.equal(trained[key], loaded[key])
    ]  # fmt: skip
    require(problems, "Emulator and base must have the same module paths: set auto_class to the class that users load.")


def _on_base(subject: TinyModel, adapter: Path) -> Any:
    return load_lora(subject.load(subject.base.directory), adapter).eval()


@check(adapter_keys)
def correction(subject: TinyModel) -> None:
    """Unclamped, the base with the corrected LoRA equals the tuned emulator on the LoRA's input subspace."""
    emulator = load_lora(subject.load(subject.emulator), subject.adapter).train()  # what infers may round more
    base = _on_base(subject, subject.corrected)
    loras = Adapter(subject.adapter).loras
    problems = []
    with torch.no_grad():
        for path, lora in loras.items():
            name = f"base_model.model.{path}"
            expected, actual = (model.get_submodule(name)(lora.a) for model in (emulator, base))
            allowed = RELATIVE * float(expected.abs().max()) + ABSOLUTE
            if not float((actual - expected).abs().max()) <= allowed:
                problems.append(f"corrected, {path} on the base does not answer as the tuned emulator did")
    require(
        problems,
        "The Linear computes more than W x + b, or its checkpoint tensor is not its weight: list it in keep_dense.",
    )


@check(correction)
def merge(subject: TinyModel) -> None:
    """The merged checkpoint holds the result of PEFT's merge_and_unload, and every other tensor unchanged."""
    expected = as_linears(_on_base(subject, subject.corrected).merge_and_unload()).state_dict()
    actual = as_linears(subject.load(subject.merged)).state_dict()
    problems = [f"only one of them has {key}" for key in sorted(expected.keys() ^ actual.keys())]
    problems += [
        f"{key} is not what PEFT's merge_and_unload gives"
        for key in sorted(expected.keys() & actual.keys())
        if not torch.allclose(actual[key], expected[key], rtol=RELATIVE, atol=ABSOLUTE)
    ]
    loras = {f"{path}.weight" for path in Adapter(subject.corrected).loras}
    problems += [
        f"{key} has no LoRA and was changed"
        for key, tensor in subject.model.state_dict().items()
        if key in actual and key not in loras and not torch.equal(actual[key], tensor)
    ]
    require(
        problems, "A checkpoint tensor that the Linear is made from is not its weight alone: list it in keep_dense."
    )


@check(trains)
def memory(subject: TinyModel) -> str:
    """The memory plan counts the parameters of base and emulator exactly."""
    if subject.family.objective != TOKENS:
        return "Plans are for models of tokens."
    planned = MemoryModel(subject.base.directory / "config.json", Workload(batch_size=1, length=16))
    ranks = read_object(subject.emulator / "config.json")["quantization_config"]["ranks"]
    counts = {
        "base": (planned.parameters(), subject.model),
        "emulator": (planned.parameters(planned.linears.with_ranks(ranks)), subject.load(subject.emulator)),
    }
    problems = []
    for name, (count, model) in counts.items():
        actual = sum(parameter.numel() for parameter in model.parameters())
        if count != actual:
            problems.append(f"the memory plan counts {count} parameters in the {name}, which has {actual}")
    require(problems, "Put every Linear into one input group, once; auto_class is the class that users load.")
    return f"{counts['base'][0]} parameters in the base, {counts['emulator'][0]} in the emulator."


@check(merge)
def ties(subject: TinyModel) -> str:
    """Weights that are tied in the base are tied in the emulator and in the merged checkpoint."""
    tied: dict[str, str] = subject.skeleton.tied
    loras = {f"{path}.weight" for path in Adapter(subject.corrected).loras}
    pairs = {name: source for name, source in tied.items() if not {name, source} & loras}
    problems = []
    for kind, directory in (("emulator", subject.emulator), ("merged checkpoint", subject.merged)):
        model = subject.load(directory)
        for name, source in pairs.items():
            first, second = (_parameter(model, key) for key in (name, source))
            if first is not second:
                problems.append(f"{name} is tied to {source} in the base, but not in the {kind}")
            elif first.is_floating_point() and not torch.equal(first, subject.model.get_parameter(name)):
                problems.append(f"{name} of the {kind} is not the base's")
    require(problems, "Keep them out of input_groups and lora_targets.")
    return f"Tied: {', '.join(pairs)}." if pairs else "Nothing is tied in this config."


def _parameter(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter; for a weight that is packed by rows, its codes."""
    owner, _, last = name.rpartition(".")
    layer = model.get_submodule(owner)
    return getattr(layer, "codes" if isinstance(layer, PackedLayer) and last == "weight" else last)
