"""A format of emulator as a plugin brings it: weights in eight bits, with a scale for every row."""

import torch

from emloc_core.algorithms.factorize import output_error
from emloc_core.hookspecs import hookimpl
from emloc_core.standins import Format, Packed, PackedLinear


class EightBitLinear(PackedLinear):
    """``y = W x + b`` with ``weight`` in eight bits, beside a scale for every row."""

    @classmethod
    def parts(cls, shape, *_):
        """What is kept of a weight, by the names of the layer's parameters."""
        m, n = shape
        return {"weight": ((m, n), torch.int8), "weight_scales": ((m, 1), torch.float32)}

    @staticmethod
    def unpack(*parts, dtype, **_):
        """The weight that these stand for."""
        codes, scales = parts
        return (codes * scales).to(dtype)


class EightBits(Format):
    """Weights in eight bits."""

    name = "8-bit"
    layer = EightBitLinear
    calibrations = ("propagated", "base", "none")

    def fit(self, weights, gram, *_):
        """Round weights; their outputs tell how far that is from what was asked for."""
        return [self._packed(weight, gram.matrix) for weight in weights]

    def round(self, weight):
        """Round a weight of whose inputs nothing is known."""
        return self._packed(weight, torch.eye(weight.shape[1]))

    def _packed(self, weight, gram):
        scales = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        codes = (weight / scales).round().to(torch.int8)
        error = output_error(weight, codes * scales, gram)
        return Packed({"weight": codes, "weight_scales": scales}, tuple(weight.shape), error)

    def told(self, *_):
        """What a dry run says of it."""
        return "eight bits"


@hookimpl
def emloc_emulators():
    """The formats by name: emloc compress --kind 8-bit."""
    return {EightBits.name: EightBits}
