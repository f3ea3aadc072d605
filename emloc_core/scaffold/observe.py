"""Observes one forward pass of a model: its stacks of blocks, and which Linears read the same input."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from emloc_core.emulator.coverage import fused_weights
from emloc_core.errors import EmlocError, typed_line
from emloc_core.model.hooks import forward_hooks
from emloc_core.model.weight_reads import read_without_call
from emloc_core.scaffold.merge import Block, is_within, merged
from emloc_core.standins.experts import computes_as_experts

ROUTED = "each expert sees only the tokens that are routed to it"
ROUTER = "routes tokens to experts"
GATE = "a gate of a single output"
UNCALLED = "its weight is used without calling it, or this forward did not reach it"
READ = "its weight is read without calling it, as for a fused kernel, which would get a factor instead"
LISTED = "in a list inside the block, as experts are"
OTHER = "computes something else than W x + b"
#: Reasons that a person should look at.
DOUBTFUL = (UNCALLED, LISTED, OTHER)


def block_lists(model: nn.Module) -> list[str]:
    """Return the paths of the outermost lists of similar modules that hold Linears: the candidates."""
    lists: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in lists):
            continue
        kinds = [type(child) for child in module]
        alike = len(kinds) > 0 and (len(kinds) == 1 or 2 * len(set(kinds)) <= len(kinds) or _share_layout(module))
        if alike and any(_holds_linears(child) for child in module):
            lists.append(path)
    return lists


def _share_layout(blocks: nn.ModuleList) -> bool:
    """Say whether blocks of different classes have a Linear at the same path, as in a short hybrid model."""
    paths = [{name for name, module in block.named_modules() if isinstance(module, nn.Linear)} for block in blocks]
    return bool(set.intersection(*paths))


def _holds_linears(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear) for module in block.modules() if module is not block)


class Observation:
    """One forward of a model with real weights.

    Args:
        lists: paths of lists of blocks; those that the forward did not reach are left out.

    Attributes:
        calls: how often each module was called, by path.
        stacks: the lists that are stacks of blocks, in order of execution, with what holds in all their blocks.
        interleaved: lists that run in between the blocks of a larger list -> path of the larger one.
        unreached: the lists that the forward did not reach.

    Raises:
        EmlocError: the forward fails.
    """

    def __init__(self, model: PreTrainedModel, lists: Sequence[str], inputs: Mapping[str, Any]) -> None:
        self.model = model
        self.lists = lists
        self.calls: Counter[str] = Counter()
        self._order: list[str] = []
        self._inputs: dict[str, torch.Tensor] = {}
        self._odd: set[str] = set()
        self._known_experts: set[str] = set()
        self._read = read_without_call(model)
        with self._watching(), torch.no_grad():
            try:
                output = model(**inputs, use_cache=False)
            except Exception as error:  # whatever the architecture's own code raises
                raise EmlocError(f"The tiny model's forward fails: {typed_line(error)}") from error
        row = next(iter(inputs.values()))  # tokens
        self._tokens = row.shape[:2].numel()
        if (logits := getattr(output, "logits", row)).shape[1] != row.shape[1]:
            raise EmlocError(f"The row has {row.shape[1]} tokens, and logits for {logits.shape[1]}.")
        reached = {path: [name for name in self._order if self._is_block(name, path)] for path in lists}
        self.unreached = [path for path, blocks in reached.items() if not blocks]
        self.interleaved = self._find_interleaved([path for path, blocks in reached.items() if blocks])
        towers = sorted(
            (path for path, blocks in reached.items() if blocks and path not in self.interleaved),
            key=lambda path: self._order.index(reached[path][0]),
        )
        self.stacks = [merged(path, self.blocks(path)) for path in towers]

    def _modules(self, path: str) -> list[nn.Module]:
        return list(self.model.get_submodule(path).children())

    @staticmethod
    def _is_block(name: str, path: str) -> bool:
        return name.rpartition(".")[0] == path

    def with_branches(self, others: Sequence["Observation"]) -> None:
        """Include in the stacks what was observed of the same lists in other branches of the architecture."""
        observations = [self, *others]
        self.stacks = [
            merged(path, [block for observation in observations for block in observation.blocks(path)])
            for path in (stack.path for stack in self.stacks)
        ]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        def enter(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                self.calls[path] += 1
                self._order.append(path)
                if isinstance(module, nn.Linear):
                    if args:
                        self._inputs[path] = args[0].detach().clone()
                    else:
                        self._odd.add(path)

            return hook

        def leave(path: str) -> Any:
            def hook(module: nn.Linear, args: tuple[Any, ...], output: Any) -> None:
                expected = functional.linear(args[0], module.weight, module.bias) if args else torch.empty(0)
                alike = isinstance(output, torch.Tensor) and output.shape == expected.shape
                if not alike or not torch.allclose(output, expected, rtol=1e-4, atol=1e-5):
                    self._odd.add(path)

            return hook

        def experts(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                computes = computes_as_experts(module, args, output)
                (self._known_experts.add if computes and self.calls[path] == 1 else self._known_experts.discard)(path)

            return hook

        modules = dict(self.model.named_modules())
        leaving = [(module, experts(path)) for path, module in modules.items() if fused_weights(module)]
        leaving += [(module, leave(path)) for path, module in modules.items() if isinstance(module, nn.Linear)]
        entering = forward_hooks(((module, enter(path)) for path, module in modules.items()), before=True)
        with entering, forward_hooks(leaving):
            yield

    def _find_interleaved(self, lists: Sequence[str]) -> dict[str, str]:
        """Return lists that run within another one: of such lists, the one with most parameters is the stack."""
        sizes = {path: sum(p.numel() for p in self.model.get_submodule(path).parameters()) for path in lists}
        runs = {
            path: [position for position, name in enumerate(self._order) if self._is_block(name, path)]
            for path in lists
        }
        interleaved = {}
        for path in lists:
            around = [other for other in lists if sizes[other] > sizes[path]
                      and runs[other][0] < runs[path][-1] and runs[path][0] < runs[other][-1]]  # fmt: skip
            if around:
                interleaved[path] = max(around, key=lambda other: sizes[other])
        return interleaved

    def blocks(self, path: str) -> list[Block]:
        """Return what was observed of every block of a list."""
        return [self._block(f"{path}.{index}", block) for index, block in enumerate(self._modules(path))]

    def _block(self, prefix: str, block: nn.Module) -> Block:
        dense = self._dense(prefix, block)
        order = [name for name in self._called_in(prefix) if not is_within(name, dense)]
        inputs = {name: self._inputs[f"{prefix}.{name}"] for name in order}
        alike = (frozenset(pair) for pair in combinations(order, 2) if _equal(*(inputs[name] for name in pair)))
        experts = [name for name, _ in _experts(block) if f"{prefix}.{name}" in self._known_experts]
        return Block(order, frozenset(alike), dense, experts)

    def _called_in(self, block: str) -> list[str]:
        """Return the Linears of a block in order of execution, as paths within it."""
        names = [name for name in self._order if name in self._inputs and name.startswith(f"{block}.")]
        return [name.removeprefix(f"{block}.") for name in dict.fromkeys(names)]

    def _dense(self, prefix: str, block: nn.Module) -> dict[str, str]:
        """Return what in one block cannot be compressed, with the reason."""
        dense: dict[str, str] = {}
        experts = {name: count for name, count in _experts(block) if not self._sees_all(f"{prefix}.{name}")}
        for name, module in block.named_modules():
            path = f"{prefix}.{name}"
            if is_within(name, dense):
                continue
            if path in self._known_experts:
                continue
            if name in experts:
                dense[name] = LISTED if isinstance(module, nn.ModuleList) else ROUTED
            elif isinstance(module, nn.Linear):
                reason = self._reason(path, name, module, experts)
                if reason:
                    dense[name] = reason
        return dense

    def _sees_all(self, path: str) -> bool:
        """Say whether all Linears in a list get every token, which experts never do."""
        module = self.model.get_submodule(path)
        linears = [f"{path}.{name}" for name, submodule in module.named_modules() if isinstance(submodule, nn.Linear)]
        tokens = (
            tensor.numel() // tensor.shape[-1] for name in linears if (tensor := self._inputs.get(name)) is not None
        )
        return isinstance(module, nn.ModuleList) and list(tokens) == [self._tokens] * len(linears)

    def _reason(self, path: str, name: str, module: nn.Linear, experts: Mapping[str, int]) -> str | None:
        for expert, number in experts.items():
            if number and module.out_features == number and name.startswith(expert.rpartition(".")[0]):
                return ROUTER
        if module.out_features == 1:
            return GATE
        if self.calls[path] == 0:
            return UNCALLED
        if path in self._read:
            return READ
        if self.calls[path] > 1:
            return f"runs {self.calls[path]} times a forward"
        return OTHER if path in self._odd else None


def without_gradient(model: PreTrainedModel, inputs: Mapping[str, Any]) -> set[str]:
    """Return the paths of the Linears whose weight gets no gradient from the logits.

    Such a Linear only selects, for example in an indexer that ranks tokens, or its output is not used.
    """
    model = copy.deepcopy(model)  # some keep a state, which would hold on to the graph
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    names, weights = list(linears), [module.weight.requires_grad_() for module in linears.values()]
    with torch.enable_grad():
        loss = model(**inputs, use_cache=False).logits.float().square().mean()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return {
        name for name, gradient in zip(names, gradients, strict=True) if gradient is None or not bool(gradient.any())
    }


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _experts(block: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the modules that hold experts in a block, and how many: fused weights (three dimensions), or lists."""
    for name, module in block.named_modules():
        if fused := fused_weights(module):
            yield name, fused[0].shape[0]
        elif isinstance(module, nn.ModuleList) and any(isinstance(m, nn.Linear) for m in module.modules()):
            yield name, len(module)
