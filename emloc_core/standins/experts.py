"""Fused experts: what transformers computes with them, and the same with low-rank factors.

transformers keeps the experts of a layer as two stacks of matrices in one module: ``gate_up_proj`` (E, 2 i, n), or
``up_proj`` (E, i, n) without a gate, and ``down_proj`` (E, n, i). A router sends every token to a few of them.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from emloc_core.compat.transformers import gated, grouped_product
from emloc_core.errors import EmlocError

#: What a module of experts can have besides, and low-rank ones do not.
_UNKNOWN = ("is_transposed", "has_bias", "has_post_expert_norm")


def stacks(experts: nn.Module) -> tuple[str, str]:
    """Return the names of the two stacks of a module of fused experts, in the order in which they are multiplied by.

    Raises:
        EmlocError: it computes something else with its weights.
    """
    names = ("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj")
    if not all(is_stack(experts, name) for name in names) or any(getattr(experts, name, False) for name in _UNKNOWN):
        raise EmlocError(
            f"A {type(experts).__name__} is not laid out as experts that can be factorised: {' and '.join(names)}, "
            "stacked, without biases.",
            "List it in keep_dense of the family's declaration instead.",
            code="plugin",
        )
    return names


def is_stack(model: nn.Module, path: str) -> bool:
    """Return whether there is a stack of matrices at this path, a parameter of three dimensions."""
    try:
        return model.get_parameter(path).ndim == 3
    except AttributeError:
        return False


def experts_per_token(config: Any) -> int:
    """Return how many experts a router sends every token to; 1 for a model without experts."""
    return getattr(config.get_text_config(), "num_experts_per_tok", None) or 1


def width(experts: nn.Module) -> int:
    """Return how many numbers go into and out of the matrices of one expert, factors included."""
    return sum(sum(parameter.shape[1:]) for parameter in experts.parameters() if parameter.ndim == 3)


def computes_as_experts(module: Any, args: tuple[Any, ...], output: Any) -> bool:
    """Return whether what a module computed is what experts compute that can be factorised.

    Args:
        module: with weights.
        args: of its call: hidden states (tokens, n), indices of experts (tokens, top), their weights (tokens, top).
        output: of that call.
    """
    try:
        up, down = (getattr(module, name) for name in stacks(module))
        hidden, index, weights = args
        wanted = torch.zeros_like(output)
        for expert in index.unique().tolist():
            token, place = torch.where(index == expert)
            inner = activate(module, linear(hidden[token], up[expert]))
            wanted.index_add_(0, token, linear(inner, down[expert]) * weights[token, place, None])
    except Exception:  # an unknown module, which may lack anything
        return False
    return bool(torch.allclose(output, wanted, rtol=1e-4, atol=1e-5))


def activate(experts: Any, up: torch.Tensor) -> torch.Tensor:
    """Return what ``down_proj`` is given: (tokens, i) for the output of the first stack, (tokens, 2 i) with a gate."""
    found: torch.Tensor = gated(experts, up) if experts.has_gate else experts.act_fn(up)
    return found


def factor_names(path: str) -> tuple[str, str]:
    """Return the names of the parameters U and V that stand in for the stack at a path."""
    owner, _, name = path.rpartition(".")
    return f"{owner}.U.{name}", f"{owner}.V.{name}"


class LowRankExperts(nn.Module):
    """Experts whose matrices are products of two: a stack U (E, m, k) and a stack V (E, k, n) for each stack (E, m, n).

    Args:
        experts: the module that it replaces. Its weights are given up.
        ranks: k by the name of the stack; a stack without one stays as it is.
    """

    def __init__(self, experts: Any, ranks: dict[str, int]) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.U, self.V = nn.ParameterDict(), nn.ParameterDict()
        for name in stacks(experts):
            stack = getattr(experts, name)
            count, m, n = stack.shape
            if rank := ranks.get(name):
                for factor, shape in ((self.U, (count, m, rank)), (self.V, (count, rank, n))):
                    empty = torch.empty(shape, dtype=stack.dtype, device=stack.device)
                    factor[name] = nn.Parameter(empty, requires_grad=False)
            else:
                self.register_parameter(name, stack)
            setattr(experts, name, nn.Parameter(torch.empty_like(stack, device="meta"), requires_grad=False))
        # For its activation. In a list, so that it is no part of this module.
        self._replaced = [experts]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            hidden_states: (tokens, n).
            top_k_index: (tokens, top), which experts.
            top_k_weights: (tokens, top).
        """
        top = top_k_index.shape[-1]
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        experts = torch.arange(self.num_experts, device=chosen.device)
        ends = torch.searchsorted(chosen, experts, right=True).to(torch.int32)
        up, down = stacks(self._replaced[0])
        inner = activate(self._replaced[0], self._times(up, hidden_states[order // top], ends))
        found = self._times(down, inner, ends) * top_k_weights.reshape(-1)[order, None]
        return found[order.argsort()].view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)

    def _times(self, name: str, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Multiply rows that are sorted by expert, each group by the matrix of its own."""
        if name not in self.U:
            return grouped_product(x, getattr(self, name), ends)
        return grouped_product(grouped_product(x, self.V[name], ends), self.U[name], ends)

    def dense(self) -> nn.Module:
        """Return an ordinary module of experts with the weights ``U V``."""
        experts = copy.deepcopy(self._replaced[0])
        for name in stacks(experts):
            weight = self.U[name] @ self.V[name] if name in self.U else getattr(self, name)
            setattr(experts, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
        return experts
