"""Drafts the declaration of an unknown architecture, from its config and one forward of a tiny model."""

import copy
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from emloc_core.conformance import check_family
from emloc_core.conformance.branches import other_branches, wiring_of
from emloc_core.conformance.check import under_test
from emloc_core.conformance.inputs import as_sample, tiny_samples
from emloc_core.conformance.tiny import random_model
from emloc_core.conformance.unread import unread_features
from emloc_core.data.tokenize import Sample
from emloc_core.emulator.coverage import undeclared
from emloc_core.emulator.declared import find_linears
from emloc_core.emulator.ranks import RankPlan
from emloc_core.errors import EmlocError, first_line, is_out_of_memory, typed_line
from emloc_core.family import Family
from emloc_core.files.pretrained import load_config, new_model
from emloc_core.plugins.manager import plugin_manager
from emloc_core.scaffold import deduce
from emloc_core.scaffold.config_arguments import large_sizes, make_config, minimal, not_tiny, plain
from emloc_core.scaffold.draft import Draft
from emloc_core.scaffold.observe import Observation, block_lists, without_gradient
from emloc_core.scaffold.package import name_for
from emloc_core.scaffold.probe import Probe, probes
from emloc_core.scaffold.shrink import TINY_PARAMETERS, shrink
from emloc_core.scaffold.stored import RENAMED, UNREAD, is_grouped, keep_dense, lost_by_peft, stored_otherwise
from emloc_core.standins.transposed import as_linears


def scaffold(config_file: Path, *, alone: bool = False) -> Draft:
    """Return a draft of the family that would declare the model of a config.

    Args:
        config_file: a ``config.json``. No weights are read.
        alone: draft it for this very config: no switch is flipped.

    Raises:
        EmlocError: transformers lacks the architecture, it cannot be compressed, the config cannot be shrunk to a tiny
            one, or the architecture's own code fails.
        OSError, MemoryError, RuntimeError: the disk or the memory is full.
    """
    config = load_config(config_file)
    family = _empty_family(config)
    try:
        with under_test(family):
            architecture = _Scaffold(config, family, alone=alone)
            if architecture.misses_blocks:
                architecture = _Scaffold(config, family, alone=alone, of_each=2)
        return architecture.draft()
    except EmlocError:
        raise
    except Exception as error:  # an unknown model's code
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno is not None):  # libraries give none
            raise
        raise EmlocError(
            f"The code of this {config.model_type!r} fails ({typed_line(error)}).",
            f"`emloc families new {family.name} --model-type {config.model_type}` writes a plugin that you can edit "
            "(docs/plugins.md).",
            code="plugin",
        ) from error


def check_draft(draft: Draft) -> Draft:
    """Return the draft with the faults that the conformance kit finds among its notes."""
    failed = [result for result in check_family(draft.family) if not (result.passed or result.blocked)]
    wrong = [f"Edit: the check {result.check!r} fails. {result}" for result in failed]
    return replace(draft, notes=[*draft.notes, *wrong])


class _Scaffold:
    """What is known about one architecture: the requested model, without weights, and a tiny one that ran."""

    def __init__(self, config: Any, family: Family, *, alone: bool, of_each: int = 1) -> None:
        self.config, self.family, self.alone = config, family, alone
        self.type: str = config.model_type
        self.notes: list[str] = []
        self.model = self._without_weights()
        self.lists = block_lists(self.model)
        if not self.lists:
            raise EmlocError(
                f"The model of this {self.type!r} has no list of blocks (nn.ModuleList) that hold Linears.",
                "EMLoC compresses the Linears of repeated blocks, one block at a time: there is nothing to declare.",
                code="unsupported",
            )
        self.tiny = self._tiny_arguments(of_each)
        self.input_name, self.probe, self.observation = self._observe(as_linears(self._tiny_model()))
        self.tinies = [self.tiny]
        if not alone:
            self.observation.with_branches(list(self._branches()))
        self.stored = stored_otherwise(self._tiny_model(), self.family, self.observation.stacks)
        keep_dense(self.observation.stacks, self.stored)
        unread = unread_features(self.observation.model, [as_sample(self.probe.inputs, 0)], self._grouped())
        keep_dense(self.observation.stacks, dict.fromkeys(unread, UNREAD))

    def _on_meta(self, config: Any) -> PreTrainedModel:
        """Return a model on the meta device, including its buffers: only its modules are inspected."""
        with torch.device("meta"):
            model = new_model(self.family.auto_class, copy.deepcopy(config), torch.float32)
        return as_linears(model).eval()

    def _without_weights(self) -> PreTrainedModel:
        try:
            return self._on_meta(self.config)
        except Exception as error:  # whatever the architecture's own code raises
            raise EmlocError(
                f"{self.family.auto_class} cannot build the model of this {self.type!r} ({first_line(error)}).",
                "Check the sizes in the config.json, and whether a package is missing that the architecture needs.",
            ) from error

    def _tiny_arguments(self, of_each: int) -> dict[str, Any]:
        if self.model.num_parameters() <= TINY_PARAMETERS:
            return plain(self.config)
        small = shrink(self.config, of_each)
        with suppress(EmlocError):
            self._on_meta(make_config(small))
            return small
        return shrink(self.config, 2)  # some blocks share weights with another of their kind

    def _tiny_model(self) -> PreTrainedModel:
        """Return the tiny model with random weights, so that unlike inputs do not look equal."""
        try:
            config = make_config(self.tiny)
            parameters = self._on_meta(config).num_parameters()
            if parameters > TINY_PARAMETERS:
                large = ", ".join(large_sizes(config.to_dict())) or "no size by name"
                raise not_tiny(self.type, f"{parameters:,} parameters are left; large: {large}")
            model: PreTrainedModel = random_model(self.family, config)
        except EmlocError:
            raise
        except Exception as error:  # whatever the architecture's own code raises
            raise not_tiny(self.type, error) from error
        return model

    def _observe(self, model: PreTrainedModel) -> tuple[str, Probe, Observation]:
        """Run the tiny model on the first inputs that it takes, with an image if possible; return their name, too."""
        failures: list[str] = []
        for name, make_probe in probes(model, self.family):
            try:
                probe = make_probe()
                observation = Observation(model, self.lists, probe.inputs)
            except Exception as error:  # an unknown model's code, on inputs that are a guess
                reason = str(error.args[0]) if isinstance(error, EmlocError) else first_line(error)
                failures.append(f"{name}: {textwrap.shorten(reason, 160)}")
                continue
            if failures and name == "text":
                self.notes.append(
                    f"More: no image could be made up that the tiny model takes ({'; '.join(failures)}). Declare "
                    "tiny_inputs, and the towers that text does not reach."
                )
            return name, probe, observation
        raise not_tiny(self.type, "; ".join(failures))

    def _branches(self) -> Iterator[Observation]:
        """Observe the tiny model with every switch of its config that changes the layout of its blocks."""

        def samples(config: Any) -> list[Sample]:
            image = [self.probe.make_inputs(config)] if self.probe.make_inputs else []
            family = (
                replace(self.family, modality="text")
                if self.probe.make_inputs or self.input_name == "text"
                else self.family
            )
            return [*tiny_samples(family, config), *(as_sample(inputs, 0) for inputs in image)]

        wirings = wiring_of(self.family, self.tiny, samples)
        for switch, tiny, model in other_branches(self.family, self.tiny, samples, wirings) if wirings else ():
            with suppress(EmlocError):  # it has just run on such inputs
                yield Observation(model, self.lists, self.probe.inputs)
                self.tinies.append(minimal(tiny))
                self.notes.append(f"Note: with {switch} the blocks are laid out differently: it has a tiny config.")

    @property
    def misses_blocks(self) -> bool:
        """Whether some Linears of the requested model are in no block of the tiny one."""
        return bool(self._undeclared(self.declared))

    @cached_property
    def declared(self) -> Family:
        """The declaration, as observed."""
        return replace(
            self.family,
            towers=deduce.towers(self.observation, self._without_lora(), self.notes),
            keep_dense=deduce.dense(self.observation)
            | {path: why for path, why in self.stored.items() if why == RENAMED},
            tiny_configs=self.tinies,
            tiny_inputs=self.probe.make_inputs,
        )

    def draft(self) -> Draft:
        """Return the declaration, and what a person has to know about it."""
        family = self.declared
        notes = [*self._registered(), *self.notes]
        summary = self._summary(family, notes)
        text_only = family.modality != "text" and self.input_name == "text"
        return Draft(family, summary, [*notes, *deduce.doubts(self.observation)], self.probe.source, text_only)

    def _without_lora(self) -> dict[str, str]:
        """Return the Linears on which a LoRA would be useless -> why."""
        constant = without_gradient(self.observation.model, self.probe.inputs)
        lost = lost_by_peft(self.observation.model, self._grouped())
        return dict.fromkeys(constant, deduce.CONSTANT) | dict.fromkeys(lost, deduce.LOST)

    def _grouped(self) -> list[str]:
        """Return the paths of the Linears to compress."""
        names = [name for name, module in self.observation.model.named_modules() if isinstance(module, nn.Linear)]
        return [name for name in names if is_grouped(name, self.observation.stacks)]

    def _registered(self) -> Iterator[str]:
        for other in plugin_manager().families():
            if self.type in other.model_types:
                yield f"Check: the family {other.name!r} declares {self.type} already; this one is refused beside it."

    def _summary(self, family: Family, notes: list[str]) -> str:
        """Return what the declaration covers of the requested model, as text; note what it lacks."""
        if missing := self._undeclared(family):
            notes.append(
                f"Edit: {missing[0]} ({len(missing)} in all) is in no group: the tiny model has no such block."
            )
        linears = self._plan(family).candidates
        blocks = {linear.block for linear in linears}
        held = sum(linear.out_features * linear.in_features for linear in linears)
        return (
            f"{len(linears)} Linears in {len(blocks)} blocks hold {held:,} of the {self.model.num_parameters():,} "
            f"parameters. Which of them read the same input was observed in a tiny model, given {self.input_name}."
        )

    def _undeclared(self, family: Family) -> list[str]:
        """Return what a declaration leaves out of the requested model."""
        return undeclared(self.model, self._resolved(family), self._plan(family).planned)

    def _plan(self, family: Family) -> RankPlan:
        return find_linears(self.model, self._resolved(family))

    def _resolved(self, family: Family) -> Family:
        with plugin_manager().declaring(family):
            return plugin_manager().family_for(self.config.to_dict())


def _empty_family(config: Any) -> Family:
    """Return a family that declares only how its models are built."""
    model_type: str = config.model_type
    name = name_for(model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise EmlocError(
            f"{model_type!r} is an encoder-decoder; EMLoC tunes models that read and write one sequence.",
            "Choose a decoder, such as a causal language model.",
            code="unsupported",
        )
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    # A checkpoint has the config of the class that saved it, which a class for only text has of its own.
    opens = causal and causal.config_class in MODEL_FOR_CAUSAL_LM_MAPPING
    has_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if has_images and (getattr(config, "vision_config", None) or (causal and not opens)):
        return Family(name, frozenset({model_type}), (), "AutoModelForImageTextToText", "image-text")
    if causal:
        return Family(name, frozenset({model_type}), ())
    raise EmlocError(
        f"transformers has neither a causal language model nor an image-text model of the type {model_type!r}.",
        "EMLoC tunes models that generate text.",
        code="unsupported",
    )
