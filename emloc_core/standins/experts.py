"""Fused experts: what transformers computes with them, and the same with stand-ins for their matrices.

transformers keeps the experts of a layer as two stacks of matrices in one module: ``gate_up_proj`` (E, 2 i, n), or
``up_proj`` (E, i, n) without a gate, and ``down_proj`` (E, n, i). Some models keep them transposed, add a bias to each
product, or normalise what an expert returns. A router sends every token to a few of them.
"""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import linear, pad

from emloc_core.algorithms.lora import Lora
from emloc_core.compat.transformers import gated, grouped_product
from emloc_core.errors import EmlocError
from emloc_core.standins.layer import Groups, StandInLinear, unpacked_bytes

#: What transformers says of every module of fused experts that it can compute in several ways.
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")
#: torch multiplies groups whose rows have a multiple of 16 bytes, 8 of bf16: ranks of experts are multiples of it, and
#: LoRAs of other ranks get zeros.
ALIGNED = 8
_NONE: Mapping[str, Lora] = MappingProxyType({})


def stacks(experts: nn.Module) -> tuple[str, str]:
    """Return the names of the two stacks of a module of fused experts, in the order in which they are multiplied by.

    Raises:
        EmlocError: it computes something else with its weights.
    """
    names = _stacks(experts)
    if not is_experts(experts):
        raise EmlocError(
            f"A {type(experts).__name__} is not laid out as experts that EMLoC can compress: {' and '.join(names)}, "
            "stacked, in a class that transformers marks as experts.",
            "List it in keep_dense of the family's declaration instead.",
            code="plugin",
        )
    return names


def is_experts(module: nn.Module) -> bool:
    """Return whether a module is laid out as experts that stand-ins can replace."""
    return all(hasattr(module, flag) for flag in _FLAGS) and all(is_stack(module, name) for name in _stacks(module))


def _stacks(experts: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj"


def is_stack(model: nn.Module, path: str) -> bool:
    """Return whether there is a stack of matrices at this path, a parameter of three dimensions."""
    try:
        return model.get_parameter(path).ndim == 3
    except AttributeError:
        return False


def matrices(experts: Any, name: str) -> torch.Tensor:
    """Return a stack, (E, m, n), whichever way it is kept."""
    stack: torch.Tensor = getattr(experts, name)  # perhaps replaced for a call, and not a parameter
    return stack.mT if experts.is_transposed else stack


def experts_per_token(config: Any) -> int:
    """Return how many experts a router sends every token to; 1 for a model without experts."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_experts_per_tok", None) or 1


def expert_rank(rank: int, config: Any) -> int:
    """Return the rank of a LoRA on each expert, beside others of a rank: a token's output comes from a few experts."""
    return max(1, rank // experts_per_token(config))


def width(experts: nn.Module) -> int:
    """Return how many numbers go into and out of the matrices of one expert, factors included."""
    if isinstance(experts, StandInExperts):
        return experts.width
    return sum(sum(matrices(experts, name).shape[1:]) for name in stacks(experts))


def activate(experts: Any, up: torch.Tensor) -> torch.Tensor:
    """Return what ``down_proj`` is given: (tokens, i) for the output of the first stack, (tokens, 2 i) with a gate."""
    return gated(experts, up) if experts.has_gate else experts.act_fn(up)


def computes_as_experts(module: Any, args: tuple[Any, ...], output: Any) -> bool:
    """Return whether a module computed what experts compute that stand-ins can replace.

    Args:
        args: of its call: hidden states (tokens, n), indices of experts (tokens, top), their weights (tokens, top).
    """
    try:
        up, down = stacks(module)
        hidden, index, weights = args
        expected = torch.zeros_like(output)
        for expert in index.unique().tolist():
            token, slot = torch.where(index == expert)
            inner = activate(module, _times(module, up, expert, hidden[token]))
            product = _times(module, down, expert, inner)
            expected.index_add_(0, token, _normed(module, product) * weights[token, slot, None])
    except Exception:  # an unknown module, which may lack anything
        return False
    return bool(torch.allclose(output, expected, rtol=1e-4, atol=1e-5))


def part_name(path: str, part: str) -> str:
    """Return the name of the parameter that holds a part of what stands in for the stack at a path."""
    owner, _, name = path.rpartition(".")
    return f"{owner}.{part}.{name}"


class _Part(nn.ParameterDict):
    """A part of every stack, by the name of the stack."""

    @property
    def device(self) -> torch.device:
        """The device of the parts: PEFT asks ``weight``, whatever it is, where to put a LoRA."""
        return next(iter(self.values())).device


class StandInExperts(nn.Module):
    """Experts whose stacks are kept as a layer keeps the weight of a Linear: each of its parts, with a leading E.

    The parts of ``down_proj`` are ``weight.down_proj``, ``weight_scales.down_proj`` and so on, of matrices (m, n)
    whichever way the base keeps them. Every matrix is packed by itself: no byte belongs to two.

    Args:
        experts: the module to replace; all of it but its stacks is taken over.
        layer: what keeps matrices, and multiplies by them.
        ranks: of the factors, by the name of the stack; None where the layer keeps none. A stack that is not named
            stays as it is.
    """

    def __init__(self, experts: Any, layer: type[StandInLinear], ranks: Mapping[str, int | None]) -> None:
        super().__init__()
        self.num_experts, self.layer, self.ranks = experts.num_experts, layer, dict(ranks)
        self.is_transposed, self.has_bias = experts.is_transposed, experts.has_bias
        for name, parameter in list(experts.named_parameters(recurse=False)):
            if name in ranks:
                self._keep(name, matrices(experts, name))
            else:
                self.register_parameter(name, parameter)
        for name, module in experts.named_children():
            self.add_module(name, module)
        # In a list, so that it is no part of this module.
        self._replaced = [experts]
        self.train(experts.training)

    def _keep(self, name: str, stack: torch.Tensor) -> None:
        count, m, n = stack.shape
        for part, (size, dtype) in self.layer.parts((m, n), self.ranks[name], stack.dtype).items():
            if not hasattr(self, part):
                self.add_module(part, _Part())
            self.load(name, {part: torch.empty(count, *size, dtype=dtype, device=stack.device)})

    def load(self, name: str, parts: Mapping[str, torch.Tensor]) -> None:
        """Let these parts, by their names, stand in for a stack."""
        for part, tensor in parts.items():
            cast(nn.ParameterDict, self.get_submodule(part))[name] = nn.Parameter(tensor, requires_grad=False)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of each token's experts; see :func:`routed`."""
        return routed(self, hidden_states, top_k_index, top_k_weights)

    def times(self, name: str, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Multiply rows that are sorted by expert, each group by its own matrix; see ``grouped``."""
        if name not in self.ranks:
            return grouped_product(x, matrices(self, name), groups.ends)
        return self.layer.grouped(x, groups, *self.tensors(name), shape=self._shape(name), dtype=self._dtype(name))

    @property
    def replaced(self) -> Any:
        """The module that it replaces, without its stacks: for what it computes between them."""
        return self._replaced[0]

    def tensors(self, name: str) -> list[torch.Tensor]:
        """Return what is kept of a stack, in the order of the layer's parts."""
        parts = self.layer.parts(self._shape(name), self.ranks[name], self._dtype(name))
        return [getattr(self, part)[name] for part in parts]  # perhaps replaced for a call, and not parameters

    def stand_ins(self) -> dict[str, nn.Parameter]:
        """Return the parameters that stand in for stacks, by name; what the base has besides is not among them."""
        return {name: part for name, part in self.named_parameters() if name.partition(".")[2] in self.ranks}

    @property
    def width(self) -> int:
        """How many numbers go into and out of the matrices of one expert, factors included."""
        return width(self.replaced) + 2 * sum(rank or 0 for rank in self.ranks.values())

    @property
    def unpacked_bytes(self) -> int:
        """Bytes of a stack that are unpacked at a time."""
        stacks_of = ((self._shape(name), self._dtype(name)) for name in self.ranks)
        return max(unpacked_bytes(shape, self.num_experts, dtype) for shape, dtype in stacks_of)

    def _shape(self, name: str) -> tuple[int, int]:
        _, m, n = matrices(self.replaced, name).shape
        return m, n

    def _dtype(self, name: str) -> torch.dtype:
        return self.replaced.get_parameter(name).dtype

    def dense(self) -> nn.Module:
        """Return an ordinary module of experts with the matrices that the stand-ins stand for."""
        experts = copy.deepcopy(self.replaced)
        own = dict(self.named_parameters())
        for name in [name for name, _ in experts.named_parameters()]:
            if name in self.ranks:
                stack = self.layer.unpack_stack(*self.tensors(name), shape=self._shape(name), dtype=self._dtype(name))
                weight = stack.mT.contiguous() if self.is_transposed else stack
            else:
                weight = own[name]
            owner, _, last = name.rpartition(".")
            setattr(experts.get_submodule(owner), last, nn.Parameter(weight.detach().clone(), requires_grad=False))
        return experts

    def extra_repr(self) -> str:
        """Describe the module in the model's printout."""
        shapes = ("{} x {}".format(*self._shape(name)) for name in self.ranks)
        return f"{self.num_experts} experts of {', '.join(shapes)}, as in {self.layer.__name__}"


def routed(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    loras: Mapping[str, Lora] = _NONE,
) -> torch.Tensor:
    """Return the weighted sum of each token's experts, with LoRAs on their stacks.

    Args:
        experts: the module, or its stand-ins.
        hidden_states: (tokens, n).
        top_k_index: (tokens, top), which experts.
        top_k_weights: (tokens, top).
        loras: by the names of stacks, of all their matrices: ``a`` (E, r, n), ``b`` (E, m, r).
    """
    own = experts.replaced if isinstance(experts, StandInExperts) else experts
    sorted_experts, order = top_k_index.reshape(-1).sort(stable=True)
    number = torch.arange(experts.num_experts, device=sorted_experts.device)
    groups = Groups(torch.searchsorted(sorted_experts, number, right=True).to(torch.int32))

    def times(name: str, x: torch.Tensor) -> torch.Tensor:
        if isinstance(experts, StandInExperts):
            output = experts.times(name, x, groups)
        else:
            output = grouped_product(x, matrices(experts, name), groups.ends)
        if name in loras:
            output = _with_lora(output, x, loras[name], groups.ends)
        return with_bias(experts, name, output, sorted_experts)

    up, down = _stacks(own)  # perhaps replaced for a call, and not parameters
    inner = activate(own, times(up, hidden_states[order // top_k_index.shape[-1]]))
    output = _normed(own, times(down, inner)) * top_k_weights.reshape(-1)[order, None]
    return output[order.argsort()].view(*top_k_index.shape, output.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def _with_lora(output: torch.Tensor, x: torch.Tensor, lora: Lora, ends: torch.Tensor) -> torch.Tensor:
    """Add the output of a LoRA on all experts for rows sorted by expert, computed in its dtype, or in autocast's."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lora.a.dtype
    missing = -lora.a.shape[1] % ALIGNED
    a, b = pad(lora.a.to(dtype), (0, 0, 0, missing)), pad(lora.b.to(dtype), (0, missing)).contiguous()
    change = grouped_product(grouped_product(x.to(dtype), a, ends), b, ends)
    return (output + lora.scale * change).to(output.dtype)


def _times(experts: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    return with_bias(experts, name, linear(x, matrices(experts, name)[expert]), expert)


def replace_experts(model: nn.Module, path: str, layer: type[StandInLinear], ranks: Mapping[str, int | None]) -> None:
    """Replace a module of experts with empty stand-ins for its stacks, whose memory is freed."""
    experts = model.get_submodule(path)
    model.set_submodule(path, StandInExperts(experts, layer, ranks))
    for name in stacks(experts):
        empty = torch.empty_like(experts.get_parameter(name), device="meta")
        setattr(experts, name, nn.Parameter(empty, requires_grad=False))


def with_bias(experts: Any, name: str, output: torch.Tensor, expert: int | torch.Tensor) -> torch.Tensor:
    """Add the bias of an expert, or of the expert of every row."""
    return output + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else output


def _normed(experts: Any, output: torch.Tensor) -> torch.Tensor:
    """Return what experts return, normalised where their module has a norm for it."""
    norm = experts.post_expert_norm if experts.has_post_expert_norm else None
    return output if norm is None else norm(output)
