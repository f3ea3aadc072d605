"""Takes a few steps of an ordinary LoRA with plain PEFT, and records the losses and gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from emloc_core.conformance.trial import TokenTrial
from emloc_core.errors import EmlocError
from emloc_core.settings import TrainSettings
from emloc_core.standins.transposed import as_linear
from emloc_core.tuning.trl import lora_config

STEPS = 2
#: The loss of a model on a sample, with its gradient.
Loss = Callable[[Any, Any], torch.Tensor]
_LEARNING_RATE = 1e-2
_PREFIX = "base_model.model."


@dataclass
class Tuned:
    """A model with a trained LoRA.

    Attributes:
        model: in eval mode.
        odd: path of each module with a LoRA that is not a Linear -> its class.
        untouched: paths of the Linears whose LoRA got no gradient, or only zeros.
    """

    model: Any
    losses: list[float] = field(default_factory=list)
    odd: dict[str, str] = field(default_factory=dict)
    untouched: list[str] = field(default_factory=list)


def tune(
    model: nn.Module,
    targets: list[str],
    samples: Sequence[Any],
    loss: Loss | None = None,
    task: str | None = "CAUSAL_LM",
) -> Tuned:
    """Train a LoRA with the toolkit's settings.

    Args:
        samples: one batch of all samples.
        loss: the loss of a model on a sample; by default the one for tokens.
        task: PEFT's name for the task.

    Raises:
        EmlocError: there are no targets, or PEFT refuses them.
    """
    if not targets:
        raise EmlocError("No tower gets a LoRA by default.", "Name lora_targets in at least one of the towers.")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            tuned = Tuned(get_peft_model(model, lora_config(TrainSettings(lora_rank=4), targets, task)))
        except ValueError as error:
            raise EmlocError(
                f"PEFT cannot put a LoRA on {', '.join(targets)} ({error}).", "Correct lora_targets of the towers."
            ) from error
        for path, module in tuned.model.named_modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(as_linear(module.get_base_layer()), nn.Linear):
                tuned.odd[path.removeprefix(_PREFIX)] = type(module.get_base_layer()).__name__
        _train(tuned, samples, loss or TokenTrial().loss)
    tuned.model.eval()
    return tuned


def _train(tuned: Tuned, samples: Sequence[Any], loss_of: Loss) -> None:
    lora = tuned.model
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=_LEARNING_RATE)
    for step in range(STEPS):
        # In the first step dropout and stochastic depth must not decide which Linears get a gradient. But Linears are
        # always in train mode: for inference on a CPU, bitsandbytes packs their weights in another way.
        lora.train(step > 0)
        for module in lora.modules():
            module.training |= isinstance(module, nn.Linear)
        loss = torch.stack([loss_of(lora, sample) for sample in samples]).mean()
        loss.backward()
        tuned.losses.append(float(loss))
        if not step:  # B is zero and A has no gradient yet
            tuned.untouched += [
                name.partition(".lora_B")[0].removeprefix(_PREFIX)
                for name, parameter in lora.named_parameters()
                if ".lora_B." in name and (parameter.grad is None or not bool(parameter.grad.any()))
            ]
        optimizer.step()
        optimizer.zero_grad()
