"""The layers of an emulator, and putting them into a model. Needs torch alone: transformers takes seconds to import."""

from collections import defaultdict

import torch
from torch import nn
from torch.nn import functional

from emloc_core.errors import EmlocError
from emloc_core.experts import LowRankExperts, is_stack
from emloc_core.quantised import FewLevelsLinear, FourBitLowRankLinear, PackedLinear, RepairedLinear

#: The ``quant_method`` of an emulator.
METHOD = "emloc"
#: Field of an emulator's config.json with its kind, by which one in four bits differs from a base that is.
MARK = "emloc_kind"
#: Of factors as they are, of factors in four bits, of weights on a few levels, and of weights on three levels with a
#: repair in four bits. Older readers refuse what they do not know.
FORMAT_VERSION, FOUR_BITS_VERSION, LEVELS_VERSION, REPAIRED_VERSION = 1, 2, 3, 4


class LowRankLinear(nn.Linear):
    """``y = U (V x) + b``: a Linear of out_features x in_features stored as two factors.

    It is an ``nn.Linear`` whose ``weight`` *is* U (out_features, rank), plus the parameter ``V`` (rank,
    in_features). So PEFT puts a LoRA on it as on any Linear, with the same keys as on the base, and ``all-linear``
    finds no inner Linears to target.
    """

    V: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not nn.Linear.__init__, which would allocate out_features x in_features.
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return functional.linear(functional.linear(input, self.V), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()}, rank={self.rank}"

    def dense(self) -> nn.Linear:
        """Return an ordinary Linear with the weight ``U V``."""
        device, dtype = self.weight.device, self.weight.dtype
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device, dtype)
        with torch.no_grad():
            linear.weight.copy_(self.weight @ self.V)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


Layer = LowRankLinear | FourBitLowRankLinear | FewLevelsLinear | RepairedLinear
#: The class of a Linear's stand-in by the format of what it holds.
LAYERS: dict[int, type[Layer]] = {
    FORMAT_VERSION: LowRankLinear,
    FOUR_BITS_VERSION: FourBitLowRankLinear,
    LEVELS_VERSION: FewLevelsLinear,
    REPAIRED_VERSION: RepairedLinear,
}


def replace_linears(model: nn.Module, sizes: dict[str, int], format_version: int = FORMAT_VERSION) -> None:
    """Replace Linears, and stacks of experts, with their empty stand-ins, on the same devices.

    Args:
        model: is changed.
        sizes: rank, or number of levels, by path of the Linear, or of the stack.
        format_version: see :data:`LAYERS`.

    Raises:
        EmlocError: the model has no Linear at one of the paths.
    """
    experts: dict[str, dict[str, int]] = defaultdict(dict)
    for path, size in sizes.items():
        if is_stack(model, path):
            owner, _, name = path.rpartition(".")
            experts[owner][name] = size
            continue
        replace_linear(model, path, LAYERS[format_version], size)
    for path, of in experts.items():
        model.set_submodule(path, LowRankExperts(model.get_submodule(path), of))


def replace_linear(model: nn.Module, path: str, kind: type[LowRankLinear | PackedLinear], size: int = 0) -> None:
    """Replace one Linear with its empty stand-in, on the same device.

    Args:
        model: is changed.
        path: of the Linear.
        kind: class of the stand-in.
        size: rank, or number of levels, where it has one.

    Raises:
        EmlocError: the model has no Linear there.
    """
    try:
        linear = model.get_submodule(path)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise EmlocError(
            f"The model has no Linear at {path}.", "The emulator belongs to another architecture.", code="mismatch"
        )
    device, dtype = linear.weight.device, linear.weight.dtype
    layer = kind(linear.in_features, linear.out_features, size, linear.bias is not None, device, dtype)
    if isinstance(layer, LowRankLinear):  # what is packed is not trained, nor what repairs it
        layer.requires_grad_(linear.weight.requires_grad)
    layer.train(linear.training)
    model.set_submodule(path, layer)
