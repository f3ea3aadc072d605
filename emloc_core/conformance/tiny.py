"""A tiny model of a family on disk, and the output of each stage on it, made on first access."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.correct import Correct
from emloc_core.adapters.merge import Merge
from emloc_core.conformance.check import Subject
from emloc_core.conformance.forward import Decomposed, Forward, decompose, observe
from emloc_core.conformance.inputs import runnable
from emloc_core.conformance.trial import label
from emloc_core.conformance.tuning import Tuned, tune
from emloc_core.emulator.compress import Compress
from emloc_core.emulator.declared import find_linears
from emloc_core.emulator.ranks import RankPlan
from emloc_core.errors import EmlocError, first_line
from emloc_core.family import Family
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.model.blocks import block_paths
from emloc_core.model.opened import OpenModel
from emloc_core.model.skeleton import Skeleton, build_model
from emloc_core.objective import Sample, Trial
from emloc_core.plugins.manager import plugin_manager
from emloc_core.requests import CompressRequest, CorrectRequest, MergeRequest
from emloc_core.settings import CompressSettings, CorrectSettings
from emloc_core.standins import LowRank
from emloc_core.standins.registry import format_named
from emloc_core.standins.transposed import as_linears

RATIO = 0.5
_NOISE = 0.1  # added to the weights as the model initialises them


def labels(family: Family) -> list[str]:
    """Return a readable name for every tiny config: the model types in it, numbered if several are alike."""
    names = [label(config) for config in family.tiny_configs]
    counts: Counter[str] = Counter()
    unique = []
    for name in names:
        counts[name] += 1
        unique.append(name if counts[name] == 1 else f"{name}-{counts[name]}")
    return unique


class TinyModel(Subject):
    """One tiny model, and everything that the stages make from it.

    Args:
        settings: keyword arguments of ``AutoConfig.for_model``.
        directory: where files go; it is created.
    """

    def __init__(
        self, declared: Family, settings: Mapping[str, Any], label: str, directory: Path, kind: str = LowRank.name
    ) -> None:
        super().__init__(declared, label)
        self.settings, self.directory, self.kind = settings, directory, kind

    @cached_property
    def config(self) -> Any:
        """The library's config.

        Raises:
            EmlocError: the library refuses it.
        """
        return tiny_config(self.settings, self.declared)

    @cached_property
    def family(self) -> Family:
        """The declaration for this config, including nested families."""
        return plugin_manager().family_for(self.config.to_dict())

    @cached_property
    def meta(self) -> nn.Module:
        """The model without weights."""
        return on_meta(self.family, self.config)

    @cached_property
    def plan(self) -> RankPlan:
        """Every Linear that the family names; none has a rank."""
        return find_linears(self.meta, self.family)

    @cached_property
    def samples(self) -> list[Any]:
        """The samples that the model runs on."""
        return runnable(self.model, list(trial_of(self.family).samples(self.family, self.config)))

    @cached_property
    def base(self) -> Checkpoint:
        """The model on disk, fp32, with a tokenizer."""
        model = random_model(self.family, self.config)
        trial_of(self.family).save(model, self.config, self.directory / "base")
        return Checkpoint(self.directory / "base")

    def load(self, directory: Path) -> Any:
        """Return a model as its users load it, in eval mode."""
        return trial_of(self.family).load(self.family, directory).eval()

    @cached_property
    def model(self) -> Any:
        """The base in memory, with its Conv1D as Linears; frozen as in streams, because torch may compute by that."""
        return as_linears(self.load(self.base.directory)).requires_grad_(False)

    @cached_property
    def skeleton(self) -> Skeleton:
        """The base, streamed."""
        return OpenModel(self.base, self.family).skeleton

    @cached_property
    def forward(self) -> Forward:
        """Ordinary forward passes of all samples.

        Raises:
            EmlocError: the model does not run.
        """
        blocks = block_paths(self.meta, self.family)
        model, samples = self.model, self.samples
        try:
            return observe(model, samples, [linear.path for linear in self.plan.linears], blocks)
        except (ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:
            raise EmlocError(
                f"The tiny model does not run on rows made up for it ({first_line(error)}).",
                "Correct the tiny config; for images, declare tiny_inputs if the rows are not what the model takes.",
            ) from error

    @cached_property
    def decomposed(self) -> Decomposed:
        """The result of a streamed pass of all samples."""
        return decompose(self.skeleton, self.plan, self.samples)

    @cached_property
    def emulator(self) -> Path:
        """The emulator, made from all samples, also those with images."""
        return self.emulator_of(self.kind)

    def emulator_of(self, kind: str, **settings: Any) -> Path:
        """Make an emulator of any kind, with other settings than usual."""
        size = {"ratio": RATIO} if format_named(kind).ratios else {}
        request = CompressRequest(
            model=str(self.base.directory),
            data=trial_of(self.family).rows(self.samples),
            output=self.directory / f"emulator-{kind}",
            device="cpu",
            settings=CompressSettings(kind=kind, samples=1, selection=0, **size, **settings),
        )
        return _Compress(request, self.samples).run()

    @cached_property
    def tuned(self) -> Tuned:
        """The emulator, loaded from its files, with a trained LoRA.

        Raises:
            EmlocError: PEFT refuses the targets.
        """
        loss, task = trial_of(self.family).loss, plugin_manager().objective_of(self.family).task
        return tune(self.load(self.emulator), self.family.lora_targets(), self.samples, loss, task)

    @cached_property
    def adapter(self) -> Path:
        """The LoRA as PEFT saves it."""
        directory = self.directory / "adapter"
        self.tuned.model.save_pretrained(directory, save_embedding_layers=False)
        return directory

    @cached_property
    def corrected(self) -> Path:
        """The LoRA carried over to the base, unclamped."""
        arguments = {"base": str(self.base.directory), "output": self.directory / "corrected", "device": "cpu"}
        request = CorrectRequest(adapter=self.adapter, settings=CorrectSettings(clamp="none"), **arguments)
        return Correct(request, Adapter(self.adapter)).run()

    @cached_property
    def merged(self) -> Path:
        """The base with the corrected LoRA folded in."""
        base, output = str(self.base.directory), self.directory / "merged"
        return Merge(MergeRequest(adapter=self.corrected, base=base, output=output)).run()


class _Compress(Compress):
    """Stage 1 on made-up samples."""

    def __init__(self, request: CompressRequest, samples: Sequence[Sample]) -> None:
        self._made_up = samples
        super().__init__(request)

    def _sampled(self) -> Sequence[Sample]:
        return self._made_up


def trial_of(family: Family) -> Trial:
    """Return what makes tiny models of a family."""
    return plugin_manager().objective_of(family).trial()


def tiny_config(settings: Mapping[str, Any], family: Family | None = None) -> Any:
    """Return the library's config for the settings of a tiny one; transformers' if no family is given.

    Raises:
        EmlocError: the library refuses it.
    """
    trial = trial_of(family) if family else plugin_manager().objective_for({}).trial()
    return trial.config(settings)


def on_meta(family: Family, config: Any) -> nn.Module:
    """Return the model of a config, without weights.

    Raises:
        EmlocError: it cannot be built.
    """
    try:
        return build_model(copy.deepcopy(config), family, torch.float32)
    except Exception as error:  # whatever the model's own code raises
        raise EmlocError(
            f"{family.auto_class} cannot build the tiny {config.model_type!r} ({first_line(error)}).",
            "Correct the entry of tiny_configs (sizes must fit each other), or auto_class.",
        ) from error


def random_model(family: Family, config: Any) -> Any:
    """Return a seeded model in fp32 and eval mode, without weights of exactly zero or one, which would hide errors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = plugin_manager().objective_of(family).build(family, copy.deepcopy(config), torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(_NOISE * torch.randn_like(parameter))
    return model.eval()
