"""Deduces a family's declaration from one observed forward pass: towers, dense Linears, LoRA targets."""

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from emloc_core.emulator.coverage import matrices
from emloc_core.errors import EmlocError
from emloc_core.family import Tower
from emloc_core.model.lockstep import units
from emloc_core.scaffold.observe import DOUBTFUL, Observation
from emloc_core.scaffold.stored import is_grouped

OUTSIDE = "outside the blocks, and small"
UNREACHED = "not reached by the forward that was observed"
CONSTANT = "no gradient reaches it"
LOST = "PEFT renames it as it loads an adapter, and drops it"
ELSEWHERE = "PEFT would put it elsewhere too"
_MODALITIES = {"vision": ("vision", "visual", "image"), "audio": ("audio", "speech")}
#: Patterns that match the numbers of blocks, and nothing else.
_NUMBERS = ("[0-9]", "[0-9][0-9]", "[0-9][0-9][0-9]")
#: Parts that rows of text and images never reach.
_OTHER_ROWS = ("audio", "speech", "video")


def towers(observation: Observation, idle: Mapping[str, str], notes: list[str]) -> list[Tower]:
    """Return the stacks of blocks with Linears that can be compressed, in order of execution.

    Args:
        idle: paths of the Linears that get no LoRA -> the reason, for example that it would learn nothing.
        notes: gets a note for each place without a LoRA.

    Raises:
        EmlocError: there is no such stack.
    """
    stacks = [stack for stack in observation.stacks if stack.groups]
    if not stacks:
        reasons = {reason: path for stack in observation.stacks for path, reason in reversed(stack.dense.items())}
        listing = "; ".join(f"{path}: {reason}" for reason, path in reasons.items())
        model_type = observation.model.config.model_type
        raise EmlocError(
            f"No block of this {model_type!r} holds a Linear that can be compressed ({listing}).",
            "EMLoC compresses only Linears (nn.Linear): use another model.",
            code="unsupported",
        )
    trained = {name for name in observation.calls if is_grouped(name, stacks)} - set(idle)
    names = _tower_names([stack.path for stack in stacks])
    declared = []
    for name, stack in zip(names, stacks, strict=True):
        linears = [path for group in stack.groups for path in group]
        left_out = {path: why for path in linears for linear, why in idle.items() if _is_in(linear, path, stack.path)}
        targets = {path: _target(observation.model, path, trained) for path in linears if path not in left_out}
        left_out |= {path: ELSEWHERE for path, target in targets.items() if target is None}
        for why in dict.fromkeys(left_out.values()):
            listing = ", ".join(path for path, reason in left_out.items() if reason == why)
            notes.append(f"Check: {listing} of {stack.path} gets no LoRA by default: {why}.")
        ends = list(dict.fromkeys(target for target in targets.values() if target))
        plain = not left_out and all("." not in end for end in ends)
        declared.append(Tower(name, stack.path, stack.groups, None if plain else ends, stack.experts or ()))
    return declared


def _is_in(linear: str, path: str, blocks: str) -> bool:
    """Say whether a Linear is at this path within some block."""
    return linear.startswith(f"{blocks}.") and linear.removeprefix(f"{blocks}.").partition(".")[2] == path


def _tower_names(paths: Sequence[str]) -> list[str]:
    """Name towers by their paths; ``language`` if a path does not say."""
    names: list[str] = []
    for path in paths:
        kinds = [kind for kind, words in _MODALITIES.items() if any(word in path for word in words)]
        name = kinds[0] if kinds else "language"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _target(model: Any, path: str, allowed: Collection[str]) -> str | None:
    """Return the shortest end of a path that PEFT matches only with allowed modules; None if there is none."""
    from peft import LoraConfig, get_peft_model

    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        end = ".".join(parts[-count:])
        with (
            warnings.catch_warnings(action="ignore"),
            suppress(ValueError),
        ):  # PEFT refuses to put a LoRA on some of the modules of that name
            tuned = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=[end], r=1))
            names = [name.partition(".lora_")[0] for name, _ in tuned.named_parameters() if ".lora_" in name]
            if {name.removeprefix("base_model.model.") for name in names} <= set(allowed):
                return end
    return None


def dense(observation: Observation) -> dict[str, str]:
    """Return patterns of what is never compressed, outside the blocks and in them, each with its reason."""
    model: Any = observation.model
    patterns = {
        f"{path}.*": f"runs in between the blocks of {other}" for path, other in observation.interleaved.items()
    }
    patterns |= {f"{path}.*": UNREACHED for path in observation.unreached}
    head = model.get_output_embeddings()
    for unit in units(model, [stack.path for stack in observation.stacks]):
        module = model.get_submodule(unit)
        listed = any(unit.startswith(f"{path}.") for path in observation.lists)
        paths = set() if listed or module is head else set(matrices(module))
        if paths:
            skipped = any(path.startswith(f"{unit}.") for path in observation.unreached)
            reason = UNREACHED if skipped else OUTSIDE
            patterns |= dict.fromkeys([unit] * ("" in paths) + [f"{unit}.*"] * bool(paths - {""}), reason)
    for stack in observation.stacks:
        grouped = {path for group in stack.groups for path in group}
        for path, reason in stack.dense.items():
            # A star matches dots, too: the pattern for `dense` would include `attention.dense`.
            numbers = _NUMBERS if any(f".{other}".endswith(f".{path}") for other in grouped) else ("*",)
            patterns |= {f"{stack.path}.{number}.{path}": reason for number in numbers}
    return patterns


def doubts(observation: Observation) -> Iterator[str]:
    """Yield what a person has to check."""
    for path in observation.unreached:
        if any(word in path for word in _OTHER_ROWS):
            yield f"Check: {path} is kept dense: rows of text and images do not reach it."
            continue
        yield f"More: the forward that was observed did not reach {path}: declare it as a tower to have it compressed."
    lists = [stack.path for stack in observation.stacks]
    for unit in units(observation.model, lists):
        if observation.calls[unit] > 1 and unit.rpartition(".")[0] in lists:
            yield f"Edit: {unit} runs {observation.calls[unit]} times a forward, which streaming refuses."
    for stack in observation.stacks:
        for path, reason in stack.dense.items():
            if reason in DOUBTFUL:
                yield f"Check: {stack.path}.*.{path} is kept dense: {reason}."
