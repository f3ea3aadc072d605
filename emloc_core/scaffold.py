"""Drafts the declaration of an unknown architecture, from its config and one forward of a tiny model."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.pytorch_utils import Conv1D

from emloc_core.conformance import check_family
from emloc_core.conformance.tiny import first_line, quiet
from emloc_core.draft import Draft
from emloc_core.errors import EmlocError
from emloc_core.family import Family, Tower
from emloc_core.observe import DOUBTFUL, Observation, Stack, block_lists
from emloc_core.plan import find_linears
from emloc_core.plugins import plugin_manager
from emloc_core.probe import Probe, probes
from emloc_core.shrink import TINY_PARAMETERS, make_config, not_tiny, plain, shrink
from emloc_core.skeleton import build_model, read_config
from emloc_core.streaming import units

HEAD = "each of its outputs is a token's logit"
OUTSIDE = "outside the blocks, and small"
_MODALITIES = {"vision": ("vision", "visual", "image"), "audio": ("audio", "speech")}


def scaffold(config_file: Path) -> Draft:
    """Return a draft of the family that would declare the model of a config.

    Args:
        config_file: a ``config.json``. No weights are read.

    Raises:
        EmlocError: transformers lacks the architecture, it is none that can be compressed, or the config cannot be
            shrunk to that of a tiny model.
    """
    with quiet():
        return _Scaffold(read_config(config_file)).draft()


def check_draft(draft: Draft) -> Draft:
    """Return the draft with what the conformance kit finds wrong with it among its notes."""
    failed = [result for result in check_family(draft.family) if not result.passed]
    wrong = [f"Edit: the check {result.check!r} fails. {result}" for result in failed if "Could not run: it needs"
             not in result.message]  # fmt: skip
    return replace(draft, notes=[*draft.notes, *wrong])


class _Scaffold:
    """What is known about one architecture: the model that was asked for, without weights, and a tiny one that ran."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.type: str = config.model_type
        self.notes: list[str] = []
        self.family = _empty_family(config)
        self.model = self._build(config)
        self.lists = block_lists(self.model)
        if not self.lists:
            raise EmlocError(
                f"The model of this {self.type!r} has no list of blocks (nn.ModuleList) that hold Linears.",
                "EMLoC compresses the Linears of repeated blocks, one block at a time: there is nothing to declare.",
            )
        self.tiny = plain(config) if _parameters(self.model) <= TINY_PARAMETERS else shrink(config)
        self.probe, self.seen = self._observe(self._tiny_model())

    def _build(self, config: Any) -> PreTrainedModel:
        try:
            return build_model(copy.deepcopy(config), self.family, torch.float32)
        except Exception as error:  # whatever the architecture's own code raises
            raise EmlocError(
                f"{self.family.auto_class} cannot build the model of this {self.type!r} ({first_line(error)}).",
                "Check the sizes in the config.json; a package that the architecture needs may be missing.",
            ) from error

    def _tiny_model(self) -> PreTrainedModel:
        """Return the tiny model with random weights; no norm is the identity, or unlike inputs would look equal."""
        import transformers

        try:
            meta = build_model(make_config(self.tiny), self.family, torch.float32)
            if _parameters(meta) > TINY_PARAMETERS:
                large = [name for name, value in self.tiny_sizes() if value > 512]
                raise not_tiny(self.type, f"{_parameters(meta):,} parameters are left, for {', '.join(large)}")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model: PreTrainedModel = getattr(transformers, self.family.auto_class).from_config(
                    make_config(self.tiny), dtype=torch.float32
                )
                for parameter in model.parameters():
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
        except EmlocError:
            raise
        except Exception as error:  # whatever the architecture's own code raises
            raise not_tiny(self.type, error) from error
        return model.eval()

    def tiny_sizes(self) -> list[tuple[str, int]]:
        """Return the whole numbers of the tiny config by name."""
        return [(name, value) for name, value in make_config(self.tiny).to_dict().items() if type(value) is int]

    def _observe(self, model: PreTrainedModel) -> tuple[Probe, Observation]:
        """Run the tiny model on the first inputs that it takes, with an image if it can be."""
        failures: list[str] = []
        for name, make in probes(model, self.family):
            try:
                probe = make()
                seen = Observation(model, self.lists, probe.inputs)
            except Exception as error:  # an unknown model's code, on inputs that are a guess
                failures.append(f"{name}: {first_line(error)}")
                continue
            if failures and name == "text":
                self.notes.append(
                    f"Edit: no image could be made up that the tiny model takes ({'; '.join(failures)}). Declare "
                    "tiny_inputs, and the towers that text does not reach."
                )
            return probe, seen
        raise not_tiny(self.type, "; ".join(failures))

    def draft(self) -> Draft:
        """Return the declaration."""
        stacks = [stack for stack in self.seen.stacks if stack.groups]
        if not stacks:
            reasons = {reason: path for stack in self.seen.stacks for path, reason in reversed(stack.dense.items())}
            told = "; ".join(f"{path} is {reason}" for reason, path in reasons.items())
            raise EmlocError(
                f"No block of this {self.type!r} holds a Linear that can be compressed ({told}).",
                "EMLoC factors nn.Linear alone: use another model.",
            )
        names = _tower_names([stack.path for stack in stacks])
        family = replace(
            self.family,
            towers=[Tower(name, stack.path, stack.groups, self._lora_targets(stack))
                    for name, stack in zip(names, stacks, strict=True)],
            keep_dense=self._dense(),
            tiny_configs=[self.tiny],
            tiny_inputs=self.probe.make,
        )  # fmt: skip
        family = self._with_nested(family)
        self._note_doubts(family)
        return Draft(family, self._summary(family), self.notes, self.probe.source)

    def _dense(self) -> dict[str, str]:
        """Return what is never compressed, outside the blocks and in them, with the reason."""
        model, seen = self.seen.model, self.seen
        dense = {f"{path}.*": f"runs in between the blocks of {other}" for path, other in seen.interleaved.items()}
        dense |= {f"{path}.*": "not reached by the forward that was observed" for path in seen.unreached}
        apart = tuple(f"{path}." for path in (*self.lists,))
        head = model.get_output_embeddings()  # type: ignore[operator]
        for unit in units(model, [stack.path for stack in seen.stacks]):
            module = model.get_submodule(unit)
            if not unit.startswith(apart) and any(isinstance(part, nn.Linear | Conv1D) for part in module.modules()):
                pattern = unit if isinstance(module, nn.Linear) else f"{unit}.*"
                dense[pattern] = HEAD if module is head else OUTSIDE
        for stack in seen.stacks:
            dense |= {f"{stack.path}.*.{path}": reason for path, reason in stack.dense.items()}
        return dense

    def _lora_targets(self, stack: Stack) -> list[str]:
        """Return ends of paths that no module but the tower's Linears has; nothing, where their last parts will do."""
        model, paths = self.seen.model, [path for group in stack.groups for path in group]
        groups = [path for other in self.seen.stacks for group in other.groups for path in group]
        own = tuple(f".{path}" for path in groups)
        others = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D | nn.Embedding | nn.modules.conv._ConvNd)
            and not (name.startswith(tuple(f"{other.path}." for other in self.seen.stacks)) and name.endswith(own))
        ]
        targets = [_shortest_end(path, others) for path in paths]
        return [] if all("." not in target for target in targets) else list(dict.fromkeys(targets))

    def _with_nested(self, family: Family) -> Family:
        """Take towers from the families that declare the models inside this one."""
        for part in getattr(self.config, "sub_configs", None) or {}:
            section = getattr(self.config, part, None)
            inner = None
            with suppress(EmlocError):  # no family declares it
                inner = plugin_manager().family_for(section.to_dict()) if section is not None else None
            path = _stands_at(inner, family) if inner else None
            if inner is None or path is None:
                continue
            moved = replace(family, towers=(), keep_dense={}).with_nested(inner, path)
            taken = {tower.blocks for tower in moved.towers}
            family = replace(
                family,
                towers=[tower for tower in family.towers if tower.blocks not in taken],
                keep_dense={name: why for name, why in family.keep_dense.items() if name not in moved.keep_dense},
                nested={**family.nested, part: path},
            )
        return family

    def _note_doubts(self, family: Family) -> None:
        seen = self.seen
        for path in seen.unreached:
            self.notes.append(f"Edit: the forward that was observed did not reach {path}: declare it as a tower if it "
                              "should be compressed.")  # fmt: skip
        for unit in units(seen.model, [stack.path for stack in seen.stacks]):
            if seen.calls[unit] > 1:
                self.notes.append(f"Edit: {unit} runs {seen.calls[unit]} times a forward, which streaming refuses.")
        for stack in seen.stacks:
            for path, reason in stack.dense.items():
                if reason in DOUBTFUL:
                    self.notes.append(f"Check: {stack.path}.*.{path} is kept dense: {reason}.")
        for other in plugin_manager().families():
            if shared := family.model_types & other.model_types:
                known = ", ".join(sorted(shared))
                self.notes.insert(
                    0,
                    f"Check: the installed family {other.name!r} declares {known} already; beside it, this is refused.",
                )

    def _summary(self, family: Family) -> str:
        with plugin_manager().declaring(family):
            resolved = plugin_manager().family_for(self.config.to_dict())
        linears = find_linears(self.model, resolved).candidates
        blocks = {linear.block for linear in linears}
        held = sum(linear.out_features * linear.in_features for linear in linears)
        return (
            f"{len(linears)} Linears in {len(blocks)} blocks hold {held:,} of the {_parameters(self.model):,} "
            f"parameters. Which of them read the same input was observed in a tiny model, given {self.probe.name}."
        )


def _empty_family(config: Any) -> Family:
    """Return the family with nothing declared but how its models are built.

    Raises:
        EmlocError: transformers has no model of the kind that can be tuned here.
    """
    name: str = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise EmlocError(
            f"{name!r} is an encoder-decoder; EMLoC tunes models that read and write one sequence.",
            "Choose a decoder, such as a causal language model.",
        )
    has_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "vision_config")
    if has_images:
        return Family(name, frozenset({name}), (), "AutoModelForImageTextToText", "image-text")
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return Family(name, frozenset({name}), ())
    raise EmlocError(
        f"transformers has neither a causal language model nor an image-text model of the type {name!r}.",
        "EMLoC tunes models that write text.",
    )


def _tower_names(paths: Sequence[str]) -> list[str]:
    """Name towers by what their paths say, language where they say nothing."""
    names: list[str] = []
    for path in paths:
        kinds = [kind for kind, words in _MODALITIES.items() if any(word in path for word in words)]
        name = kinds[0] if kinds else "language"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _shortest_end(path: str, others: Sequence[str]) -> str:
    parts = path.split(".")
    ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    free = (end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others))
    return next(free, path)


def _stands_at(inner: Family, family: Family) -> str | None:
    """Return the path at which the last towers of ``family`` are those of ``inner``, whose model stands there."""
    found = family.towers[-len(inner.towers) :]
    if len(found) < len(inner.towers) or not inner.towers:
        return None
    paths = set()
    for tower, declared in zip(found, inner.towers, strict=True):
        rest = f".{declared.blocks.removeprefix('model.')}"
        groups = {frozenset(group) for group in tower.input_groups}
        known = [frozenset(group) for group in declared.input_groups]
        if not tower.blocks.endswith(rest) or not all(any(group <= other for other in known) for group in groups):
            return None
        paths.add(tower.blocks.removesuffix(rest))
    return paths.pop() if len(paths) == 1 else None


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
