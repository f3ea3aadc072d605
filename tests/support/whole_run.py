"""A whole run on one model, from compress to merge, judged by the reference in :mod:`support.whole_model`."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support import whole_model as reference
from support.jobs import compress_job, correct_job, merge_job
from torch import nn
from transformers.pytorch_utils import Conv1D

from emloc_core.conformance.inputs import text_rows
from emloc_core.conformance.tuning import tune
from emloc_core.data.tokenize import Sample
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.pretrained import load_model
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import CompressSettings, CorrectSettings
from emloc_core.standins.experts import StandInExperts
from emloc_core.standins.vocabulary import PackedEmbedding

RIGHT, REFUSED, WRONG, CRASHED = "right", "refused", "wrong", "crashed"
#: How far two ways to compute the same in fp32 may lie apart, relative to the largest number.
TOLERANCE = 1e-4
#: The same for logits, which a deep model takes further apart.
OF_LOGITS = 1e-3
#: How far an output error may lie above what is possible, as a share, and absolute: factors are computed in fp32 from
#: squares. On the emulator's inputs, kinds that round with feedback are measured by plain rounding.
OF_BASE, OF_EMULATOR = (1e-3, 1e-3), (0.5, 0.1)
#: Models whose weights are off by a rounding, to see how far it takes the logits.
NUDGES = 8
#: The least that these kinds reach: every number rounded on its own.
PLAIN = {"nf4": reference.in_four_bits, "trellis": reference.on_three_levels}
#: Ways to make an emulator: by name, the kind and its settings.
WAYS: Mapping[str, Mapping[str, Any]] = {
    "low-rank, as in the paper": {"kind": "low-rank", "ratio": 0.5, "calibration": "base", "allocator": "uniform"},
    "low-rank": {"kind": "low-rank", "ratio": 0.5, "allocator": "uniform"},
    "nf4": {"kind": "nf4"},
    "trellis": {"kind": "trellis"},
}


Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Verdict:
    """What a run came to: right, refused (and why), wrong (and what), or crashed (and where)."""

    outcome: str
    why: str = ""


def whole_run(base: Path, samples: Sequence[Sample], directory: Path, **settings: Any) -> Verdict:
    """Run all stages on a base, whose family is declared, and compare each result with the reference.

    Args:
        base: the checkpoint, with a tokenizer of numbers.
        samples: rows of text, and perhaps rows with images.
        directory: where outputs go.
        settings: of compress.
    """
    try:
        problems = list(_Run(base, samples, directory, settings).problems())
    except EmlocError as error:
        return Verdict(REFUSED, str(error.args[0]))
    except Exception as error:  # an unknown model's code
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(CRASHED, f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})")
    return Verdict(WRONG, "; ".join(problems[:4])) if problems else Verdict(RIGHT)


class _Run:
    def __init__(self, base: Path, samples: Sequence[Sample], directory: Path, settings: Mapping[str, Any]) -> None:
        self.base, self.directory = Checkpoint(base), directory
        self.samples, self.rows = list(samples), [sample.inputs("cpu") for sample in samples]
        self.family = plugin_manager().family_for(self.base.config)
        self.texts = text_rows(self.samples)
        self.settings = CompressSettings(samples=len(self.texts), selection=0, **settings)
        self.model = self._load(base)

    def _load(self, directory: Path) -> Any:
        return _as_in_training(load_model(self.family.auto_class, directory).eval())

    def problems(self) -> Iterator[str]:
        """Yield what is wrong, stage by stage."""
        emulator = self._load(self._compress())
        weights = {path: reference.weight_of(module).detach().clone() for path, module in _linears(self.model)}
        stand_ins = {path: reference.effective_weight(module) for path, module in _linears(emulator)
                     if type(module) is not type(self.model.get_submodule(path))}  # fmt: skip
        if not stand_ins:
            yield "nothing was compressed"
        yield from self._poor(emulator, weights, stand_ins)
        modules = [(path, module) for path, module in emulator.named_modules() if isinstance(module, StandInExperts)]
        others = {
            f"{path}.{name}": stack for path, module in modules for name, stack in reference.stacks(module).items()
        }
        others |= {
            path: table.weight[:] for path, table in emulator.named_modules() if isinstance(table, PackedEmbedding)
        }
        yield from self._apart("the emulator", emulator, reference.with_weights(self.model, others | stand_ins))

        tuned = _as_in_training(tune(emulator, self.family.lora_targets(), self.samples).model)
        adapter = self.directory / "adapter"
        tuned.save_pretrained(adapter, save_embedding_layers=False)
        learned = reference.loras(adapter)
        answered = {path: (weights | stand_ins)[path] + lora.delta for path, lora in learned.items()}
        yield from self._apart(
            "the tuned emulator", tuned, reference.with_weights(self.model, others | stand_ins | answered)
        )

        clamp = CorrectSettings(clamp="none")
        corrected = correct_job(adapter, self.base, self.directory / "corrected", clamp).run()
        expected = {path: lora.corrected(weights[path], stand_ins.get(path, weights[path]))
                    for path, lora in learned.items()}  # fmt: skip
        carried = reference.loras(corrected)
        if odd := carried.keys() ^ expected.keys():
            yield f"the corrected adapter and the trained one differ in {sorted(odd)[0]}"
        for path, lora in carried.items():
            if not _near(lora.delta, expected[path]):
                yield f"the corrected LoRA of {path} is not the paper's"

        merged = self._load(merge_job(corrected, self.base, self.directory / "merged").run())
        by_hand = reference.with_weights(self.model, {path: weights[path] + expected[path] for path in expected})
        actual, wanted = merged.state_dict(), by_hand.state_dict()
        if odd := actual.keys() ^ wanted.keys():
            yield f"the merged model and the base differ in {sorted(odd)[0]}"
        for key in actual.keys() & wanted.keys():
            if not _near(actual[key], wanted[key]):
                yield f"{key} of the merged model is not W + B A"
        yield from self._apart("the merged model", merged, by_hand)

    def _compress(self) -> Path:
        stage = compress_job(self.base, self.texts, self.directory / "emulator", self.settings)
        stage.samples = self.samples  # images too, for which a tiny model has no processor
        return stage.run()

    def _poor(self, emulator: Any, weights: Weights, stand_ins: Weights) -> Iterator[str]:
        """Yield Linears whose stand-in is not what the formulas say, or worse than rounding without looking at rows."""
        problems = self._poor_on(self.model, emulator, weights, stand_ins)
        for seed in range(NUDGES):
            if not problems:
                return
            # Where tokens or experts are chosen, the least rounding may choose others.
            nudged = self._poor_on(reference.nudged(self.model, seed), emulator, weights, stand_ins)
            problems = {path: problem for path, problem in problems.items() if path in nudged}
        yield from problems.values()

    def _poor_on(self, model: Any, emulator: Any, weights: Weights, stand_ins: Weights) -> dict[str, str]:
        base_inputs = reference.inputs_of(model, self.rows, stand_ins)
        emulator_inputs = reference.inputs_of(emulator, self.rows, stand_ins)
        kind, calibration = self.settings.kind, self.settings.calibration
        problems = {}
        for path, stand_in in stand_ins.items():
            if path not in base_inputs:
                problems[path] = f"{path} was compressed, and no row reaches it"
                continue
            weight, x = weights[path], base_inputs[path]
            x_later = x if calibration == "base" else emulator_inputs[path]
            if x_later.shape != x.shape:  # other tokens were chosen
                continue
            error = reference.output_error(weight, stand_in, x, x_later)
            if kind in PLAIN:
                allowed = reference.output_error(weight, PLAIN[kind](weight), x, x_later)
            else:
                # Fitted by ridge regression, which does no worse than the weight itself, and then cut to the rank.
                allowed = reference.output_error(weight, weight, x, x_later)
                allowed += reference.least_error(weight, x_later, emulator.get_submodule(path).rank)
            share, above = OF_BASE if calibration == "base" else OF_EMULATOR
            if not error <= allowed * (1 + share) + above:
                problems[path] = f"{path} has an output error of {error:.4f}, where {allowed:.4f} is possible"
        return problems

    def _apart(self, name: str, model: Any, by_hand: Any) -> Iterator[str]:
        """Yield where a model does not answer as the base patched by hand does, by more than rounding can explain."""
        pairs = list(zip(reference.logits(model, self.rows), reference.logits(by_hand, self.rows), strict=True))
        if all(_near(actual, wanted, OF_LOGITS) for actual, wanted in pairs):
            return
        # Where tokens or experts are chosen, the least rounding may choose others.
        nudged = [reference.logits(reference.nudged(by_hand, seed), self.rows) for seed in range(NUDGES)]
        for row, (actual, wanted) in enumerate(pairs):
            floor = max(_distance(logits[row], wanted) for logits in nudged)
            if not _distance(actual, wanted) <= max(3 * floor, OF_LOGITS * float(wanted.abs().max())):
                yield f"{name} does not answer as the base patched by hand does (row {row + 1})"
                return


def _as_in_training(model: Any) -> Any:
    """Let Linears compute as in training: bitsandbytes rounds more where it only infers on a CPU."""

    def train(linear: nn.Module, _args: object) -> None:
        linear.train()  # again and again: a model's own code may put its parts in eval mode

    for _, linear in _linears(model):
        linear.register_forward_pre_hook(train)
    return model


def _linears(model: Any) -> list[tuple[str, nn.Linear | Conv1D]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _near(actual: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return _distance(actual, wanted) <= tolerance * float(wanted.abs().max()) + 1e-7 if wanted.numel() else True


def _distance(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference; what is infinite in both is no difference."""
    difference = (actual.double() - wanted.double()).abs()
    return float(difference.masked_fill(actual == wanted, 0).max())
