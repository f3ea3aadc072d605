"""Flow matching as an objective. Imports nothing heavy: every config that is not transformers' asks for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_core.errors import EmlocError
from emloc_core.objective import Datasets, Longest, Purpose, Sample, Step, Trial

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from emloc_core.algorithms.lora import Lora
    from emloc_core.data.limits import Limits
    from emloc_core.data.row import Row
    from emloc_core.family import Family
    from emloc_core.files.checkpoint import Checkpoint
    from emloc_core.memory.model import MemoryModel
    from emloc_core.model.opened import OpenModel
    from emloc_core.settings import StepSettings
    from emloc_diffusers.encoding import Encoded


class FlowMatching:
    """See :class:`emloc_core.objective.Objective`."""

    type_key, weights, folder = "_class_name", "diffusion_pytorch_model", "transformer"
    dtype_key = "_dtype"  # diffusers would take `dtype` for an argument of the class, and warns
    keeps_rows = False
    task = None
    library = "diffusers"
    scored_by = "pictures"

    def config(self, path: Path) -> Any:
        """Return diffusers' config."""
        from emloc_diffusers.transformer import read_config

        return read_config(path)

    def build(self, family: "Family", config: Any, dtype: "torch.dtype") -> Any:
        """Return one of diffusers' transformers."""
        from emloc_diffusers.pretrained import new_transformer

        return new_transformer(family.auto_class, config, dtype)

    def tensor_loader(self, model: Any, conversions: Sequence[Any]) -> Any:
        """Return a loader that puts every tensor where its key says."""
        from emloc_diffusers.transformer import TensorsByName

        return TensorsByName(model)

    def require_rows(self, rows: "Sequence[Row]", family: "Family") -> None:
        """Refuse anything but pictures with prompts."""
        if wrong := next((row for row in rows if row.form != "picture"), None):
            raise EmlocError(
                f"{wrong.name} is a row of {wrong.form}, but models of the family {family.name} make pictures.",
                "Give rows of `prompt` and `image`.",
                code="mismatch",
            )

    def samples(
        self, model: "OpenModel", rows: "Sequence[Row]", max_length: int | None, purpose: Purpose
    ) -> Sequence[Sample]:
        """Return several draws of every row."""
        from emloc_diffusers.calls import call_of
        from emloc_diffusers.flow import DRAWS, draws

        call = call_of(model.family.auto_class)
        return draws(encoded(model, rows, max_length), call, times(model), DRAWS[purpose], purpose)

    def accompany(self, checkpoint: "Checkpoint", adapter: Path) -> None:
        """Write the LoRA in the form that pipelines load."""
        from emloc_diffusers.lora_file import write_for_pipelines

        write_for_pipelines(adapter)

    def foreign_tensors(self, model: "OpenModel", loras: "Mapping[str, Lora]") -> "dict[str, torch.Tensor]":
        """Return the tensors by the names that ComfyUI and kohya's scripts read."""
        from emloc_diffusers.comfyui import renamed

        def rows(path: str) -> int:
            return int(model.skeleton.model.get_submodule(path).weight.shape[0])  # type: ignore[index]

        return renamed(model.family.auto_class, loras, rows)

    def usage(self, kind: str, class_name: str, base: str) -> str | None:
        """Return the code that loads it into a pipeline."""
        pipe = f'pipe = DiffusionPipeline.from_pretrained("{base}"'
        if kind in ("emulator", "checkpoint"):
            loaded = f'transformer = {class_name}.from_pretrained("DIRECTORY")'
            return (
                f"from diffusers import DiffusionPipeline, {class_name}\n\n{loaded}\n{pipe}, transformer=transformer)"
            )
        loaded = 'pipe.load_lora_weights("DIRECTORY", weight_name="pytorch_lora_weights.safetensors")'
        return f"from diffusers import DiffusionPipeline\n\n{pipe})\n{loaded}"

    def check(self, settings: "StepSettings") -> None:
        """Refuse settings that apply only to text."""
        if settings.learns_preferences or settings.trains_modules:
            raise EmlocError(
                "Models that make pictures learn no preferences, and train no modules in full.",
                "Leave out the objective, modules_to_save and trainable_token_indices.",
            )
        if settings.extra:
            raise EmlocError(
                f"{sorted(settings.extra)[0]} does not apply to learning pictures.",
                "Leave it out.",
                code="unsupported",
            )

    def measure(
        self, model: "OpenModel", rows: "Sequence[Row]", evaluated: "Sequence[Row]", settings: "StepSettings"
    ) -> dict[str, Any]:
        """Return the number of patches of the largest picture; pictures are scaled down instead of cut."""
        from emloc_diffusers.encoding import patches

        side = patch_side(model)
        sizes = [patches(row, side, settings.max_length) for row in rows]
        largest = max(range(len(rows)), key=sizes.__getitem__)
        return {
            "longest_tokens": sizes[largest],
            "longest_row": rows[largest].name,
            "cut_rows": 0,
            "dropped_rows": 0,
            "duplicate_rows": len(rows) - len({row.key for row in rows}),
            "examples": len(rows),
        }

    def arguments(
        self, settings: "StepSettings", checkpoints: Path, rows: "Sequence[Row]", *, exact: bool, **fixed: Any
    ) -> "TrainingArguments":
        """Return transformers' arguments."""
        from emloc_diffusers.training import arguments

        return arguments(settings, checkpoints, exact=exact, **fixed)

    def datasets(
        self,
        model: "OpenModel",
        rows: "Sequence[Row]",
        evaluated: "Sequence[Row]",
        settings: "StepSettings",
        arguments: "TrainingArguments",
    ) -> Datasets:
        """Return the encoded rows."""
        from emloc_diffusers.training import Pictures, sizes

        train = Pictures(encoded(model, rows, settings.max_length), times(model), model.family.auto_class)
        held_out = None
        if evaluated:
            drawn: Any = self.samples(model, evaluated, settings.max_length, "evaluation")
            held_out = Pictures(drawn, times(model), model.family.auto_class)
        return Datasets(train, held_out, sizes(train), None)

    def trainer(
        self,
        model: "OpenModel",
        settings: "StepSettings",
        targets: Sequence[str],
        arguments: Any,
        *,
        adapter: Path | None,
        **options: Any,
    ) -> Any:
        """Return a trainer of a LoRA."""
        from emloc_diffusers.training import trainer

        return trainer(model, settings, targets, arguments, adapter=adapter, **options)

    def exact_trainer(self) -> type[Any]:
        """Return the trainer with streamed blocks."""
        from emloc_diffusers.training import StreamedFlowTrainer

        return StreamedFlowTrainer

    def vocabulary(self, config: Any) -> int:
        """Return 0: there are no logits."""
        return 0

    def dtype(self, config_file: Path) -> str | None:
        """Return the dtype of the weights beside the config, or bfloat16."""
        from emloc_diffusers.step import dtype_beside

        return dtype_beside(config_file)

    def longest(
        self, config_file: Path, family: "Family", rows: "Sequence[Row]", length: int | None, limits: "Limits"
    ) -> Longest:
        """Return the patches of the largest picture."""
        from emloc_diffusers.calls import call_of
        from emloc_diffusers.step import most_patches

        self.require_rows(rows, family)
        return Longest(most_patches(config_file, call_of(family.auto_class), rows, length))

    def step(self, memory: "MemoryModel") -> Step:
        """Return pictures without contents."""
        from emloc_diffusers.step import FlowStep

        return FlowStep(memory)

    def answers(
        self, base: str, adapter: Path, rows: "Sequence[Row]", *, max_new_tokens: int, guidance: float | None
    ) -> list[dict[str, str]]:
        """Return the pipeline's pictures, from the same noise."""
        from emloc_diffusers.pictures import answers

        return answers(base, adapter, rows, guidance)

    def trial(self) -> Trial:
        """Return the trial of tiny transformers."""
        from emloc_diffusers.trial import FlowTrial

        return FlowTrial()


def encoded(model: "OpenModel", rows: "Sequence[Row]", tokens: int | None) -> "list[Encoded]":
    """Return rows encoded by the pipeline of a transformer, or of an emulator's base; scales down large pictures."""
    from emloc_diffusers.calls import call_of
    from emloc_diffusers.encoding import Encoder
    from emloc_diffusers.pipeline import Parts, pipeline_of

    parts = Parts(pipeline_of(model.checkpoint))
    return Encoder(parts, call_of(model.family.auto_class), model.config, tokens).encode(rows)


def patch_side(model: "OpenModel") -> int:
    """Return the side of a patch, in pixels."""
    from emloc_diffusers.calls import call_of
    from emloc_diffusers.pipeline import Parts, pipeline_of

    return Parts(pipeline_of(model.checkpoint)).factor * call_of(model.family.auto_class).patch


def times(model: "OpenModel") -> Any:
    """Return how times are drawn."""
    from emloc_diffusers.calls import call_of
    from emloc_diffusers.flow import Times
    from emloc_diffusers.pipeline import Parts, pipeline_of

    return Times.for_call(call_of(model.family.auto_class), Parts(pipeline_of(model.checkpoint)).scheduler())
