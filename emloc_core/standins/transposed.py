"""transformers' Conv1D, which GPT-2 is made of, as a Linear: it multiplies by a weight that it keeps transposed.

The toolkit looks at models that have Linears in their place. Checkpoints, and what ``from_pretrained`` returns, keep
the weight as it is.
"""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class TransposedLinear(nn.Linear):
    """A Linear whose weight, (out_features, in_features), stands transposed in the checkpoint."""


def as_linears(model: Model) -> Model:
    """Replace every Conv1D of a model by a Linear on the same weight, and return the model."""
    for path, module in list(model.named_modules()):
        if (linear := as_linear(module)) is not module:
            model.set_submodule(path, linear)
    return model


def as_linear(module: nn.Module) -> nn.Module:
    """Return the Linear on the weight of a Conv1D; any other module is returned as it is."""
    if type(module).__name__ != "Conv1D":  # importing its class would import transformers
        return module
    weight, bias = (module.get_parameter(name) for name in ("weight", "bias"))
    inputs, outputs = weight.shape
    linear = TransposedLinear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(weight.detach().T, weight.requires_grad)
    linear.bias = bias
    return linear.train(module.training)


def as_conv1d(linear: nn.Linear) -> nn.Module:
    """Return a Conv1D with a copy of the weight of a Linear."""
    from transformers.pytorch_utils import Conv1D

    conv1d = Conv1D(linear.out_features, linear.in_features).to(linear.weight)
    with torch.no_grad():
        conv1d.weight.copy_(linear.weight.T)
        conv1d.bias.copy_(linear.bias)
    return conv1d
