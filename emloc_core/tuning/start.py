"""The start of tuning: a new LoRA, or an adapter's LoRA, which is trained further on the base.

Both know the model and the settings that follow from the request, and which modules get a LoRA;
:mod:`emloc_core.tuning.train` takes the steps.
"""

from pathlib import Path
from typing import Any

import click
from peft import LoraConfig
from transformers import PreTrainedModel

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.belonging import require_base, require_shapes
from emloc_core.adapters.enclosed import enclosed_in
from emloc_core.adapters.moments import FILE, hash_moments, tuned_at
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.inputs import Inputs
from emloc_core.files.manifest import MANIFEST, learned_preferences, read_manifest
from emloc_core.files.quantised import is_in_four_bits
from emloc_core.model.opened import OpenModel, open_model
from emloc_core.model.recomputing import require_recomputation
from emloc_core.requests import PolishRequest, TrainRequest
from emloc_core.settings import StepSettings, TrainSettings
from emloc_core.standins.format import kind_of
from emloc_core.standins.vocabulary import vocabulary_layers
from emloc_core.tuning.targets import choose_targets
from emloc_core.tuning.trl import lora_config

#: Settings of a step that a plan decides. An emulator made for a given memory has them in its manifest.
_SHAPE = ("batch_size", "accumulation", "max_length")


class NewLora:
    """A new LoRA on a model.

    Attributes:
        model: an emulator, or an ordinary model.
        settings: including the batch and length that an emulator was planned for.
        adapter: directory of the adapter that is kept if no step improves it; None here.
        tuned_at: the learning rate that its second moments are from, if it has any.
    """

    adapter: Path | None = None
    tuned_at: float | None = None

    def __init__(self, request: TrainRequest, model: OpenModel) -> None:
        self.model = model
        self.settings = _as_planned(request.settings, self.model.checkpoint)
        self._recomputes = self.settings.gradient_checkpointing and not request.exact  # exact steps do so by themselves

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user has to know beforehand: that an emulator lacks what a correction reads."""
        model = self.model.checkpoint
        warning = (
            f"{model.directory} is an emulator without its {MANIFEST}, which the correction needs: copy the whole "
            "directory"
        )
        return (warning,) if kind_of(model.config) and read_manifest(model.directory) is None else ()

    def targets(self, model: PreTrainedModel) -> list[str]:
        """Return the ends of the paths of modules that get a LoRA, sorted.

        Raises:
            EmlocError: it cannot be trained like this.
        """
        if self._recomputes:
            require_recomputation(model)
        return self._targets()

    def _targets(self) -> list[str]:
        return choose_targets(self.model, self.settings)

    def lora(self, targets: list[str], model: PreTrainedModel) -> LoraConfig | Path:
        """Return what a LoRA on a model is made from; see :func:`emloc_core.exact.lora.lora_on`."""
        return lora_config(self.settings, targets, self.model.objective.task, model)

    def card_text(self, targets: list[str], steps: str) -> str:
        """Return the card's sentence on the LoRA and the steps that were taken."""
        settings = self.settings
        modules = ", ".join([*(f"`{target}`" for target in targets), *(["experts"] if settings.lora_experts else [])])
        return f"LoRA: rank {settings.lora_rank}, alpha {settings.lora_alpha}, on {modules}; {steps}, with TRL."

    def describe(self, _files: Inputs) -> dict[str, Any]:
        """Return what else ``--dry-run`` shows."""
        return {}

    def fingerprints(self, _files: Inputs) -> dict[str, Any]:
        """Return the fingerprints of further inputs, besides the model and the rows."""
        return {}

    @property
    def inputs(self) -> dict[str, str]:
        """The paths of further inputs, for the manifest."""
        return {}


class EnclosedLora(NewLora):
    """The LoRA that an emulator was fitted with, trained further on it.

    Attributes:
        adapter, tuned_at: see :class:`NewLora`.

    Raises:
        EmlocError: emulator or LoRA cannot be used, or settings are for a new LoRA or for preferences.
    """

    adapter: Path

    def __init__(self, request: TrainRequest, model: OpenModel, adapter: Path) -> None:
        super().__init__(request, model)
        self.adapter, self._opened = adapter, Adapter(adapter)
        self.tuned_at = tuned_at(adapter)
        emulator = self.model.checkpoint.directory
        if not self.settings.can_be_exact:
            raise EmlocError(
                f"{emulator} was fitted with a LoRA, which is trained further on answers alone.",
                "Leave out preferences and the modules that are trained themselves, or use another emulator.",
                code="unsupported",
            )
        config = self._opened.config
        lora = {"lora_rank": config.get("r", 8), "lora_alpha": float(config["lora_alpha"]),
                "use_rslora": bool(config.get("use_rslora"))}  # fmt: skip
        for name in sorted(lora.keys() & request.settings.model_fields_set):
            if getattr(self.settings, name) != lora[name]:
                raise EmlocError(
                    f"{emulator} was fitted with a LoRA whose {name} is {lora[name]}, and which is trained further.",
                    f"Leave {name} out, or use another emulator.",
                    code="mismatch",
                )
        self.settings = self.settings.model_copy(update=lora)
        click.echo(f"training the LoRA further that {emulator} was fitted with", err=True)

    def _targets(self) -> list[str]:
        return targets_of(self._opened)

    def lora(self, _targets: list[str], _model: PreTrainedModel) -> LoraConfig | Path:
        """Return the adapter's directory."""
        return self.adapter

    def fingerprints(self, files: Inputs) -> dict[str, Any]:
        """Return the fingerprints of further inputs, besides the model and the rows."""
        return {"adapter": self._opened.fingerprint(files), **hash_moments(self.adapter, files)}


class GivenLora:
    """The LoRA of an adapter of the base: corrected, trained on it or on an emulator of it, or by PEFT alone.

    Attributes:
        settings, adapter, tuned_at: see :class:`NewLora`.

    Raises:
        EmlocError: adapter or base cannot be used.
    """

    def __init__(self, request: PolishRequest) -> None:
        self._opened = Adapter(request.adapter)
        if self._opened.replaced:
            raise loras_alone(", ".join(self._opened.replaced))
        self.model = open_model(request.base or self._opened.base_name, "cpu")
        if not is_in_four_bits(self.model.checkpoint.config):
            self.model.checkpoint.require_unquantised("--base")
        self.adapter: Path = self._opened.directory
        self.tuned_at = tuned_at(self.adapter)
        self.settings: StepSettings = request.settings
        if self.settings.learning_rate is None and self.tuned_at:
            self.settings = self.settings.model_copy(update={"learning_rate": self.tuned_at / 2})

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user has to know beforehand: that the steps undo what was learned from preferences."""
        warning = (
            f"{self.adapter} was trained on preferences, which training on the likelihood of answers makes it forget"
        )
        return (warning,) if learned_preferences(self.adapter) else ()

    def targets(self, model: PreTrainedModel) -> list[str]:
        """Return the modules that have a LoRA, as the adapter names them.

        Raises:
            EmlocError: the adapter does not fit it, or has a LoRA on the output layer.
        """
        require_shapes(self._opened, model)
        if on := [path for path in vocabulary_layers(model) if path in self._opened.loras]:
            raise EmlocError(
                f"{self.adapter} has a LoRA on {on[0]}, which exact steps do not train.",
                "Use it as it is, or train one without.",
                code="unsupported",
            )
        return targets_of(self._opened)

    def lora(self, _targets: list[str], _model: PreTrainedModel) -> LoraConfig | Path:
        """Return the adapter's directory."""
        return self.adapter

    def card_text(self, _targets: list[str], steps: str) -> str:
        """Return the card's sentence on the steps that were taken."""
        return f"Polish: {steps}."

    def describe(self, files: Inputs) -> dict[str, Any]:
        """Return whether the optimiser begins with moments of tuning. Refuses another base's adapter."""
        self._require_base(files)
        return {"second_moments": (self.adapter / FILE).exists()}

    def fingerprints(self, files: Inputs) -> dict[str, Any]:
        """Return the fingerprints of further inputs, besides the model and the rows."""
        self._require_base(files)
        return {"adapter": self._opened.fingerprint(files), **hash_moments(self.adapter, files)}

    @property
    def inputs(self) -> dict[str, str]:
        """The path of the adapter, for the manifest."""
        return {"adapter": str(self.adapter.absolute())}

    def _require_base(self, files: Inputs) -> None:
        require_base(self._opened, self.model.checkpoint, files, allow_uncorrected=True)


def start_of(request: TrainRequest) -> NewLora:
    """Return the start of a request's training: a new LoRA, or the one that its emulator was fitted with.

    Raises:
        EmlocError: there is no such model, no family declares it, or settings do not fit the emulator's LoRA.
    """
    model = open_model(request.model, "cpu")
    adapter = enclosed_in(model.checkpoint.directory)
    return EnclosedLora(request, model, adapter) if adapter else NewLora(request, model)


def targets_of(adapter: Adapter) -> list[str]:
    """Return the modules that have a LoRA, as an adapter names them, sorted."""
    targets = adapter.config["target_modules"]
    return sorted(targets) if isinstance(targets, list) else [targets]


def loras_alone(names: str) -> EmlocError:
    """Return the error for exact steps that would train other modules too."""
    return EmlocError(
        f"Exact steps train only LoRAs, but {names} would be trained too.",
        "Train on an emulator or an ordinary model, and leave out exact steps.",
        code="unsupported",
    )


def _as_planned(settings: TrainSettings, model: Checkpoint) -> TrainSettings:
    """Return settings with the batch and the length that an emulator was planned for, unless they set one of these."""
    plan = ((read_manifest(model.directory) or {}).get("result") or {}).get("tuning")
    if not isinstance(plan, dict) or settings.model_fields_set & set(_SHAPE):
        return settings
    planned = StepSettings(learning_rate=None, **{name: plan[name] for name in _SHAPE if name in plan})
    length = "" if planned.max_length is None else f" of at most {planned.max_length} tokens"
    click.echo(
        f"{planned.batch_size} x {planned.accumulation} rows{length} per step, as the emulator was planned for",
        err=True,
    )
    return settings.model_copy(update=planned.model_dump(include=set(_SHAPE), exclude_unset=True))
