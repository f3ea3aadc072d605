"""Checks of a format of emulator: on random weights, and through the stages on a tiny model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from emloc_core.algorithms.factorize import output_error
from emloc_core.algorithms.statistics import Gram
from emloc_core.conformance.check import check, require
from emloc_core.conformance.tiny import TinyModel
from emloc_core.conformance.written import ABSOLUTE, correction, merge, trains
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.hookspecs import hookimpl
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.streamed import compress
from emloc_core.memory.workload import Workload
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import CompressSettings
from emloc_core.standins import Format
from emloc_core.standins.layer import Groups

#: Shapes of the weights: wider than high, higher than wide, and without whole groups of numbers.
_SHAPES = ((48, 300), (130, 64), (17, 33))
_RANK = 6
#: Shape of the matrices of a stack, and their rank: torch multiplies groups by rows of a multiple of 16 bytes.
_STACKED, _ALIGNED = (48, 64), 8
#: Largest allowed distance of an error from the reported one.
_APART = 1e-2


class TinyEmulator(TinyModel):
    """A format, and a tiny model of a family whose emulator has it."""

    def __init__(self, format: Format, family: Family, settings: Mapping[str, Any], directory: Path) -> None:
        super().__init__(family, settings, f"the format {format.name}", directory, format.name)
        self.format = format

    def fitted(self) -> Iterator[tuple[torch.Tensor, Gram, int | None, Any]]:
        """Yield weights, the Grams that they are fitted to, their ranks, and the fitted stand-ins, one by one."""
        for seed, (m, n) in enumerate(_SHAPES):
            generator = torch.Generator().manual_seed(seed)
            gram = Gram("input", n)
            gram.add(torch.randn(2 * n, n, generator=generator) * torch.logspace(0, -1, n))
            weight, rank = torch.randn(m, n, generator=generator), _RANK if self.format.ratios else None
            (fitted,) = self.format.fit([weight], gram, [rank])
            yield weight, gram, rank, fitted


@contextmanager
def offered(format: Format) -> Iterator[None]:
    """Let stages find a format by its name, whether a plugin provides it or not."""

    class Offer:
        @hookimpl
        def emloc_emulators(self) -> dict[str, Any]:
            return {format.name: lambda: format}

    try:
        plugin_manager().algorithm("emulators", format.name)
    except EmlocError:
        offer = Offer()
        plugin_manager().register(offer, f"the format {format.name}")
        try:
            yield
        finally:
            plugin_manager().unregister(offer)
    else:
        yield


@check()
def stored(subject: TinyEmulator) -> None:
    """Packed tensors have the names, shapes, dtypes and bytes that the format declares."""
    problems = []
    for weight, _, rank, fitted in subject.fitted():
        shape, packed = (weight.shape[0], weight.shape[1]), subject.format.pack(fitted, weight.dtype)
        if list(packed) != subject.format.names():
            problems.append(f"pack gives {list(packed)}, but the format names {subject.format.names()}")
        for name, (size, dtype) in subject.format.parts(shape, rank, weight.dtype).items():
            tensor = packed.get(name)
            if tensor is not None and (tuple(tensor.shape), tensor.dtype) != (tuple(size), dtype):
                problems.append(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but declared as {dtype} {tuple(size)}"
                )
    require(problems, "Correct parts of the layer: they are what is loaded, and what memory is planned by.")


@check(stored)
def read(subject: TinyEmulator) -> None:
    """The weight that is read back is finite, and as far from the original as the format says."""
    problems = []
    for weight, gram, _, fitted in subject.fitted():
        shape = (weight.shape[0], weight.shape[1])
        parts = list(subject.format.pack(fitted, weight.dtype).values())
        approximation = subject.format.read(parts, shape, weight.dtype).weight()
        if not approximation.isfinite().all():
            problems.append("NaN or Inf is read")
            continue
        actual, reported = output_error(weight, approximation, gram.matrix), fitted.relative_error()
        if not abs(actual - reported) <= _APART:
            problems.append(f"the relative error of the outputs is {actual:.4f}, but reported as {reported:.4f}")
    require(problems, "Measure the error of what will be read: see emloc_core.algorithms.factorize.output_error.")


@check(read)
def layer(subject: TinyEmulator) -> str | None:
    """The layer multiplies by the weight that is read, also for the gradient, and gives it to a dense Linear."""
    if set(subject.format.names()) != set(subject.format.layer.parts((1, 1), 1, torch.float32)):
        return "Its files are loaded by a layer other than its own."
    problems = []
    for weight, _, rank, fitted in subject.fitted():
        (m, n), packed = weight.shape, subject.format.pack(fitted, weight.dtype)
        module = subject.format.layer(n, m, rank, bias=True, dtype=weight.dtype)
        module.load_state_dict({**packed, "bias": torch.linspace(-1, 1, m)})
        dense = subject.format.read(list(packed.values()), (m, n), weight.dtype).weight()
        x = torch.randn(5, n, requires_grad=True)
        outputs, weights = module(x), torch.randn(5, m)
        (gradient,) = torch.autograd.grad((outputs * weights).sum(), x)
        for name, actual, expected in (
            ("outputs", outputs, functional.linear(x, dense, module.bias)),
            ("the gradient of the inputs", gradient, weights @ dense),
            ("the weight of the dense Linear", module.dense().get_parameter("weight"), dense),
        ):
            if not torch.allclose(actual, expected, rtol=1e-4, atol=ABSOLUTE * float(expected.abs().max()) * 10):
                problems.append(f"{name} are not those of the weight that is read")
    require(problems, "unpack and read have to give the same weight; forward has to multiply by it.")
    return None


@check(read)
def experts(subject: TinyEmulator) -> str | None:
    """Stacked, with a leading E, the parts of matrices multiply the rows of each expert by its own matrix."""
    if not subject.format.experts:
        return "Stacks of experts stay dense in it."
    format, (m, n), problems = subject.format.own(), _STACKED, []
    gram, draw = Gram("input", n), torch.Generator().manual_seed(0)
    gram.add(torch.randn(2 * n, n, generator=draw))
    fitted = format.fit(list(torch.randn(3, m, n, generator=draw)), gram, [_ALIGNED if format.ratios else None] * 3)
    packed = [list(format.pack(stack, torch.float32).values()) for stack in fitted]
    first, _, last = (format.read(parts, (m, n), torch.float32).weight() for parts in packed)
    x, weights = torch.randn(5, n, requires_grad=True), torch.randn(5, m)
    groups = Groups(torch.tensor([2, 2, 5], dtype=torch.int32))
    parts = [torch.stack(matrices) for matrices in zip(*packed, strict=True)]
    outputs = format.layer.grouped(x, groups, *parts, shape=(m, n), dtype=torch.float32)
    (gradient,) = torch.autograd.grad((outputs * weights).sum(), x)
    for name, actual, expected in (
        ("outputs", outputs, torch.cat([x[:2] @ first.T, x[2:] @ last.T])),
        ("the gradient of the inputs", gradient, torch.cat([weights[:2] @ first, weights[2:] @ last])),
    ):
        if not torch.allclose(actual, expected, rtol=1e-4, atol=ABSOLUTE * float(expected.abs().max()) * 10):
            problems.append(f"{name} are not those of the matrices that are read")
    require(problems, "unpack_stack has to give the matrices that read gives; or leave experts dense: experts = False.")
    return None


@check(trains)
def planned(subject: TinyEmulator) -> str:
    """The memory of making and of tuning the emulator is planned."""
    settings = CompressSettings(kind=subject.format.name)
    model = MemoryModel(subject.base.directory / "config.json", Workload(batch_size=1, length=16), settings)
    plan = model.plan()
    making, tuning = compress(model, plan).total, model.tuning(plan).total
    return f"Making it takes {making} bytes, and tuning it {tuning}."


#: In the order in which problems are best fixed.
CHECKS = (stored, read, layer, experts, trains, correction, merge, planned)
