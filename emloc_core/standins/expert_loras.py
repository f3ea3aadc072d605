"""A LoRA on experts: PEFT attaches it to their stacks, and its part of the output is computed separately.

PEFT wraps the module of experts once per stack, and adds a LoRA to a stack where that is read. That would unpack whole
stacks, and a packed one is no parameter. So each packed stack has a parameter without storage that PEFT attaches to,
and what PEFT wraps is computed here: each token's product with the matrix of its expert, and beside it the product
with the two factors. Dense experts are computed in the same way, without a change as large as their stack.

PEFT nests its wrappers in the order in which the module has its stacks, and its keys follow: stand-ins have them in the
order of the base.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms.lora import Lora, of_experts
from emloc_core.compat.peft import WRAPPER, parameter_wrappers
from emloc_core.errors import EmlocError
from emloc_core.standins.experts import StandInExperts, is_experts, routed, stacks


def expert_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules of fused experts that stand-ins can replace, or that are stand-ins, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, StandInExperts) or is_experts(module):
            yield path.replace(f".{WRAPPER.rstrip('.')}", ""), module


def stacks_of(experts: Any) -> tuple[str, str]:
    """Return the names of the two stacks of experts, or of those that stand-ins replace."""
    return stacks(_dense(experts))


def expert_stacks(model: nn.Module) -> list[str]:
    """Return the full paths of all stacks of experts in a model: by the ends of paths alone, PEFT misses some.

    Raises:
        EmlocError: there are none.
    """
    paths = [f"{path}.{name}" for path, module in expert_modules(model) for name in stacks_of(module)]
    if not paths:
        raise EmlocError("The model has no experts to put a LoRA on.", "Leave out --lora-experts.")
    return paths


class Placeholder(nn.Parameter):
    """A parameter of one number that looks like a stack, also after its model is moved or cast."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return it elsewhere, or in another dtype: torch would allocate every element."""
        return self.as_strided((1,), (1,)).to(*args, **kwargs).expand(self.shape)


def make_placeholders(model: nn.Module) -> None:
    """Let PEFT find the stacks of stand-ins: parameters of the base's shapes and order, each of a single number.

    The order decides which of PEFT's two wrappers is the inner one, and so the keys of its file.
    """
    for _, module in expert_modules(model):
        if not isinstance(module, StandInExperts):
            continue
        for name, parameter in _dense(module).named_parameters(recurse=False):
            own = vars(module)["_parameters"].pop(name, None)
            if own is None and name in module.ranks:
                part = next(iter(module.tensors(name)))
                nothing = torch.zeros(1, dtype=parameter.dtype, device=part.device)
                own = Placeholder(nothing.expand(parameter.shape), requires_grad=False)
            module.register_parameter(name, own)


def compute_apart(model: nn.Module) -> None:
    """Compute the LoRAs that PEFT has put on experts of a model beside their stacks, instead of PEFT's way.

    Raises:
        EmlocError: PEFT has put one on a single stack of stand-ins.
    """
    for path, wrappers in parameter_wrappers(model):
        experts = wrappers[0].get_base_layer()
        if not (isinstance(experts, StandInExperts) or is_experts(experts)):
            continue
        names = [wrapper.parameter_name for wrapper in reversed(wrappers)]  # as PEFT went through them
        if names != list(stacks_of(experts)):
            if not isinstance(experts, StandInExperts):  # PEFT's own way computes it
                continue
            raise EmlocError(
                f"The LoRA on the experts in {path} is on {' and '.join(names)}.",
                f"Put it on both stacks, in this order: {', '.join(stacks_of(experts))}.",
                code="unsupported",
            )
        outermost: Any = wrappers[0]
        outermost.forward = _Computed(experts, wrappers)


class _Computed:
    """The forward of the outermost wrapper with a single LoRA; with several, or a merged one, PEFT's forward runs."""

    def __init__(self, experts: Any, wrappers: list[Any]) -> None:
        self._experts, self._wrappers = experts, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        outermost = self._wrappers[0]
        on = not outermost.disable_adapters
        if on and (outermost.merged or len(outermost.active_adapters) != 1):
            if isinstance(self._experts, StandInExperts):
                raise EmlocError(
                    "Experts of an emulator have one LoRA at a time.", "Activate one adapter, and merge none."
                )
            return type(outermost).forward(outermost, *args, **kwargs)
        loras = {wrapper.parameter_name: of_wrapper(wrapper) for wrapper in self._wrappers if on}
        return routed(self._experts, *args, **kwargs, loras=loras)


def of_wrapper(wrapper: Any) -> Lora:
    """Return the LoRA of one of PEFT's wrappers of a stack: ``a`` (E, r, n), ``b`` (E, m, r), with their gradients."""
    (adapter,) = wrapper.active_adapters
    a, b = (half[adapter].weight for half in (wrapper.lora_A, wrapper.lora_B))
    return of_experts(a, b, float(wrapper.scaling[adapter]), wrapper.r[adapter])


def _dense(experts: Any) -> Any:
    return experts.replaced if isinstance(experts, StandInExperts) else experts
