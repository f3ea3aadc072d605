"""Evaluation while tuning: held-out rows, their loss on the model and on the base, the best checkpoint, early stopping.

Transformers' trainer evaluates, keeps the best checkpoint and stops early; here are its settings. A checkpoint is
written at every evaluation, so that the best one is there and an interrupted run resumes with the same patience.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers.trainer_callback import TrainerState

from emloc_core.adapters.held_out import summed_loss
from emloc_core.algorithms.lora import Lora
from emloc_core.compat.peft import parameter_wrappers
from emloc_core.data.row import Row
from emloc_core.model.opened import OpenModel
from emloc_core.processes.parallel import Processes
from emloc_core.settings import StepSettings
from emloc_core.standins.expert_loras import of_wrapper

#: Losses in the trainer's log.
LOSSES = MODEL_LOSS, BASE_LOSS = ("eval_loss", "eval_base_loss")
#: The trainer's name of the margin of preferences.
MARGIN = "rewards/margins"


def trainer_settings(settings: StepSettings, *, on_base: bool) -> dict[str, Any]:
    """Return fields of SFTConfig for evaluation at every ``eval_steps``, and a checkpoint with each.

    Args:
        on_base: whether the loss of the base decides which checkpoint is the best.
    """
    return {
        "eval_strategy": "steps",
        "eval_steps": settings.eval_steps,
        "save_steps": settings.eval_steps,
        "per_device_eval_batch_size": settings.batch_size,
        "prediction_loss_only": True,
        "metric_for_best_model": LOSSES[on_base],
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,  # the patience that is left
    }


class BaseLoss:
    """The loss of the base with the LoRA in training, streamed; several processes divide the rows.

    Args:
        base: the model that the emulator was made from, or that is trained by exact steps.
        rows: the rows to evaluate. Those whose answer a maximum length cuts away are left out.
        max_length: tokens per row.
    """

    def __init__(self, base: OpenModel, rows: Sequence[Row], max_length: int | None) -> None:
        self.skeleton = base.skeleton
        self.samples = base.samples(rows, max_length, "evaluation")

    def __call__(self, model: PeftModel) -> float:
        """Return the mean loss per token of the base with the LoRA of ``model``."""
        processes = Processes()
        with processes.together():
            own = [sample for index, sample in enumerate(self.samples) if processes.takes(index)]
            total = summed_loss(self.skeleton, own, loras_of(model)).to(self.skeleton.device)
        processes.add(total)
        loss, tokens = total.tolist()
        return float(loss / tokens)


def loras_of(model: PeftModel) -> dict[str, Lora]:
    """Return a copy of the LoRAs of a model in training, by the path of the module or stack of experts in the base."""
    loras = {}
    adapted: Any = model.get_base_model()
    for path, wrappers in parameter_wrappers(adapted):
        for wrapper in wrappers:
            lora = of_wrapper(wrapper)
            loras[f"{path}.{wrapper.parameter_name}"] = Lora(
                lora.a.detach().clone(), lora.b.detach().clone(), lora.scale
            )
    for path, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and not hasattr(module, "parameter_name"):
            layers: Any = module
            a, b = (part["default"].weight.detach().clone() for part in (layers.lora_A, layers.lora_B))
            loras[path] = Lora(a, b, float(layers.scaling["default"]))
    return loras


def logged(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the entries of a trainer's log that ``log.json`` keeps: steps with losses, in training and in evaluation.

    For preferences also the margin: by how much the reward of chosen answers exceeds that of rejected ones, in nats.
    """
    entries: list[dict[str, float]] = []
    for entry in history:
        if "loss" in entry:
            entries.append({name: entry[name] for name in ("step", "loss", "learning_rate", MARGIN) if name in entry})
        elif MODEL_LOSS in entry:
            entries.append({name: entry[name] for name in ("step", *LOSSES) if name in entry})
    return entries


def losses_at(step: int, log: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the losses of the evaluation after a step, from what :func:`logged` returned."""
    evaluation = next(entry for entry in log if entry["step"] == step and MODEL_LOSS in entry)
    return {name: loss for name, loss in evaluation.items() if name in LOSSES}


def is_over(saved: TrainerState) -> bool:
    """Return whether a checkpoint is of the last step, or of the one after which training stopped early."""
    callbacks: Any = saved.stateful_callbacks or {}
    control = callbacks.get("TrainerControl", {})
    return saved.global_step >= saved.max_steps or bool(control.get("args", {}).get("should_training_stop"))
