"""The plan for a model: the decision, the memory of every stage of the way decided on, and its alternatives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emloc_core.emulator.ranks import RankPlan
from emloc_core.memory import streamed
from emloc_core.memory.budget import Budget
from emloc_core.memory.decision import Decision, too_large_to_make
from emloc_core.memory.model import MemoryModel, Need
from emloc_core.memory.ways import EXACT, POLISHED, Way


@dataclass(frozen=True)
class MemoryPlan:
    """The plan for a model.

    Attributes:
        name: the model, as the other commands take it.
        way: the way decided on; where none fits, the one that needs least.
        needs: memory of each stage of that way, in order.
        plan: the emulator's ranks; None without an emulator.
        advice: what would fit, where no way does.
        card: name of the GPU whose published figures times are computed from; None: this machine's.
        layout: what ``emloc import`` has to rewrite first; None: nothing.
    """

    name: str
    decision: Decision
    way: Way
    needs: Sequence[Need]
    plan: RankPlan | None
    advice: Sequence[str]
    card: str | None = None
    layout: str | None = None

    @property
    def model(self) -> MemoryModel:
        """The model's memory under the way."""
        return self.way.model

    @property
    def budget(self) -> Budget:
        """The memory."""
        return self.decision.budget

    @property
    def warnings(self) -> list[str]:
        """Drawbacks of the way, and of what the family of the model declares."""
        coverage = self.model.coverage.warnings if self.way.kind else []
        return [*filter(None, [self._low_ratio, too_large_to_make(self.way, self.budget)]), *coverage]

    @property
    def _low_ratio(self) -> str | None:
        if self.way.ratio is None or self.way.recovery:
            return None
        return (
            f"a LoRA tuned on an emulator of ratio {self.way.ratio:g} may help the base little by itself: polish it "
            "with exact steps; shorter rows or more memory would allow a larger emulator"
        )

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        model, workload, decision = self.model, self.model.workload, self.decision
        parameters, weights = {"base": model.parameters()}, {"base": model.nbytes}
        if self.plan:
            parameters["emulator"] = model.parameters(self.plan)
            weights["emulator"] = model.emulator_bytes(self.plan)
        return {
            "model": self.name,
            "layout": self.layout,
            "family": model.family.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "in_four_bits": bool(model.packed),
            "workload": {
                "rows_per_step": workload.rows_per_step,
                "batch_size": workload.batch_size,
                "accumulation": workload.train.accumulation,
                "length": workload.length,
                "images": workload.images,
                "image": model.image.describe() if model.image else None,
                "gradient_checkpointing": workload.train.gradient_checkpointing,
                "bf16": workload.train.bf16,
                "learning_rate": workload.train.with_rate(model.linears.width).learning_rate,
                "lora_rank": workload.train.lora_rank,
                "target_modules": model.targets,
                "device": workload.device,
                "in_single_precision": model.slow,
            },
            "memory_bytes": self.budget.memory,
            "headroom_bytes": self.budget.headroom,
            "budget_bytes": self.budget.usable,
            "budget": "given" if self.budget.requested else "inference on the base",
            "best": decision.way.name if decision.way else None,
            "fits": decision.way is not None,
            "card": self.card,
            "kind": self.way.kind,
            "ratio": self.way.ratio,
            "ways": [way.describe() for way in decision.ways],
            "advice": list(self.advice),
            "warnings": self.warnings,
            "parameters": parameters,
            "weight_bytes": weights,
            "stages": [
                {"stage": need.stage, "bytes": need.total, "at": need.phase, "terms": dict(need.terms)}
                for need in self.needs
            ],
            "linears": [linear.describe() for linear in self.plan.planned] if self.plan else [],
            "kept_dense": [vars(kept) for kept in self.plan.kept] if self.plan else [],
            "coverage": model.coverage.describe(),
        }


def make_plan(
    name: str, decision: Decision, *, card: str | None = None, layout: str | None = None, advise: bool = True
) -> MemoryPlan:
    """Return the plan that a decision makes for a model.

    Args:
        advise: compute what would fit, where no way does.
    """
    way = decision.shown
    model = way.model
    plan = model.plan(way.ratio) if way.kind else None
    needs = [*model.step.before(), model.inference(), model.tuning()]
    if plan:
        needs += [streamed.compress(model, plan), model.tuning(plan), streamed.correct(model, plan)]
    if way.name in (POLISHED, EXACT):
        needs.append(streamed.exact(model))
    advice = [] if decision.way or not advise else decision.advice()
    return MemoryPlan(name, decision, way, [*needs, streamed.merge(model)], plan, advice, card, layout)
