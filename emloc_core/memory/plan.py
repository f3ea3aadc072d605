"""The plan for a model: memory of each stage, the emulator that fits, and a comparison of ways to tune."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emloc_core.algorithms import nf4
from emloc_core.emulator.ranks import RankPlan
from emloc_core.memory import stages
from emloc_core.memory.budget import advice, largest_ratio, too_large_to_make
from emloc_core.memory.model import MemoryModel, Need
from emloc_core.memory.speed import Speed
from emloc_core.memory.ways import ORDINARY, Way, best, ways


@dataclass(frozen=True)
class MemoryPlan:
    """The plan for a model.

    Attributes:
        name: the user's name for the model.
        model: the model's memory.
        needs: memory of each stage, in order.
        plan: the emulator's ranks.
        ratio: the emulator's ratio.
        budget: bytes that tuning may use.
        given: whether the user gave the budget; otherwise it is what inference on the base needs.
        advice: what would fit, if no emulator's tuning does.
        ways: comparison of the ways to tune within the budget.
    """

    name: str
    model: MemoryModel
    needs: Sequence[Need]
    plan: RankPlan
    ratio: float
    budget: int
    given: bool
    advice: Sequence[str]
    ways: Sequence[Way]

    @property
    def best(self) -> Way | None:
        """The recommended way, or None if none fits."""
        return best(self.ways)

    @property
    def warnings(self) -> list[str]:
        """Drawbacks of the recommended way, and of what the family of the model declares."""
        return [*filter(None, [self._low_ratio, self._four_bits, self._stage_one]), *self.model.coverage.warnings]

    @property
    def _four_bits(self) -> str | None:
        if nf4.is_installed() or (self.best and self.best.name == ORDINARY):
            return None
        return "emulators in four bits, which are recommended, are not compared: pip install 'emloc[quant]'"

    @property
    def _stage_one(self) -> str | None:
        return too_large_to_make(self.best.compress_bytes if self.best else 0, self.budget, self.model.workload.device)

    @property
    def _low_ratio(self) -> str | None:
        way = self.best
        if way is None or way.ratio is None or way.recovery:
            return None
        return (
            f"a LoRA tuned on an emulator of ratio {way.ratio:g} may help the base little by itself: polish it with "
            "exact steps; shorter rows, one row at a time (--batch-size 1 --accumulation 8, say) or more memory would "
            "allow a larger emulator"
        )

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        model, workload = self.model, self.model.workload
        tuning = next(need for need in self.needs if need.stage == "LoRA on the emulator")
        return {
            "model": self.name,
            "family": model.family.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "workload": {
                "batch_size": workload.batch_size,
                "length": workload.length,
                "images": workload.images,
                "image": model.image.describe() if model.image else None,
                "gradient_checkpointing": workload.train.gradient_checkpointing,
                "bf16": workload.train.bf16,
                "lora_rank": workload.train.lora_rank,
                "target_modules": model.targets,
                "device": workload.device,
            },
            "budget_bytes": self.budget,
            "budget": "given" if self.given else "inference on the base",
            "kind": model.kind.name,
            "ratio": self.ratio if model.kind.has_factors else None,
            "fits": tuning.total <= self.budget,
            "advice": list(self.advice),
            "ways": [way.describe() for way in self.ways],
            "best": self.best.name if self.best else None,
            "warnings": self.warnings,
            "parameters": {"base": model.parameters(), "emulator": model.parameters(self.plan)},
            "weight_bytes": {
                "base": model.parameters() * model.dtype.itemsize,
                "emulator": model.emulator_bytes(self.plan),
            },
            "stages": [
                {"stage": need.stage, "bytes": need.total, "at": need.phase, "terms": dict(need.terms)}
                for need in self.needs
            ],
            "linears": [each.describe() for each in self.plan.planned],
            "kept_dense": [vars(kept) for kept in self.plan.kept],
            "coverage": model.coverage.describe(),
        }


def make_plan(
    name: str,
    model: MemoryModel,
    budget: int | None = None,
    ratio: float | None = None,
    speed: Speed | None = None,
) -> MemoryPlan:
    """Plan a model.

    Args:
        name: the user's name for it.
        model: the model's memory.
        budget: bytes that tuning may use; None: what inference on the base needs.
        ratio: the emulator's ratio; None: the largest whose tuning fits.
        speed: that of the machine, for the time of a step; None: not measured.
    """
    inference = model.inference()
    allowed = inference.total if budget is None else budget
    fit = largest_ratio(model, allowed) if ratio is None else None
    chosen = fit.ratio if fit else ratio or model.kind.smallest_ratio
    plan = model.plan(chosen)
    tuning = fit.need if fit else model.tuning(plan)
    needs = [
        inference,
        model.tuning(),
        stages.compress(model, plan),
        tuning,
        stages.correct(model, plan),
        stages.merge(model),
    ]
    advised = list(advice(model, allowed)) if ratio is None and fit is None else []
    compared = ways(model, allowed, speed)
    return MemoryPlan(name, model, needs, plan, chosen, allowed, budget is not None, advised, compared)
