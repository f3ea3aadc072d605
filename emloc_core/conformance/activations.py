"""Checks of the activations: order, shared inputs, products, streamed statistics, factors."""

import copy
import inspect
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch.nn.functional import linear as times

from emloc_core.algorithms.statistics import Gram
from emloc_core.conformance.check import check, require
from emloc_core.conformance.declaration import linears
from emloc_core.conformance.forward import logits, observe
from emloc_core.conformance.inputs import is_text
from emloc_core.conformance.tiny import TinyModel
from emloc_core.conformance.unread import unread_features
from emloc_core.emulator.forwards import alike
from emloc_core.errors import EmlocError, first_line
from emloc_core.model.blocks import block_paths
from emloc_core.standins.experts import matrices, part_name
from emloc_core.standins.low_rank import LowRank, LowRankLinear

#: Largest allowed difference of activations and of logits, relative to the largest of them. In fp32, the families of
#: this repository are at most 1e-6 apart.
TOLERANCE = 1e-5
#: Error of factors of full rank in fp32, relative to the weight.
_ROUNDING = 1e-6


@check(linears)
def blocks(subject: TinyModel) -> None:
    """Every block runs once per row, in the declared order."""
    forward = subject.forward
    if not all(bool(torch.isfinite(row).all()) for row in forward.logits):
        raise EmlocError("The tiny model's logits are not all finite.", "Correct the sizes of the tiny config.")
    declared = block_paths(subject.meta, subject.family)
    ran = {path for row in forward.blocks for path in row}
    require(
        [f"no row reaches {path}" for path in declared if path not in ran],
        "Take its tower out of towers; if images alone pass through it, set modality to image-text.",
    )
    require(
        [f"{path} runs more than once per row" for row in forward.blocks for path in row if row.count(path) > 1],
        "Declare the module that repeats as one block: streaming needs each block to run once.",
    )
    order = {path: position for position, path in enumerate(declared)}
    require(
        [
            f"{path} runs before {following}, which is declared before it"
            for row in forward.blocks
            for path, following in pairwise(row)
            if order[path] > order[following]
        ],
        "Declare the towers in the order in which they run.",
    )


@check(blocks)
def causal(subject: TinyModel) -> None:
    """Another last token of a text changes no logits before it, not even if tokens have the type of answers."""
    texts = [sample for sample in subject.samples if is_text(sample)]
    if not texts:
        return
    *ids, last = texts[-1].input_ids
    variants: list[dict[str, torch.Tensor]] = [{}]
    if "token_type_ids" in inspect.signature(subject.model.forward).parameters:
        answers = torch.zeros(1, len(ids) + 1, dtype=torch.int64)  # the type that processors give to answers
        variants.append({"token_type_ids": answers})
    ends = (last, next(token for token in ids if token != last))
    pairs = [[logits(subject.model, replace(texts[-1], input_ids=[*ids, end], others=extra))[:, :-1] for end in ends]
             for extra in variants]  # fmt: skip
    apart = [deviation(changed, before) for before, changed in pairs]
    if max(apart) > tolerated(subject, apart):
        raise EmlocError(
            f"The logits of a token depend on later ones, by {max(apart):.0e} of the largest: the model is an encoder, "
            "or reads like one, and would see in training what it is to predict.",
            "Choose a decoder; where a config has is_decoder, one with is_decoder=true.",
            code="unsupported",
        )


@check(blocks)
def input_groups(subject: TinyModel) -> None:
    """The Linears of each group read one input, and the groups are declared in the order in which they run."""
    inputs = subject.forward.inputs
    planned = subject.plan.linears
    require(
        [f"no row reaches {linear.path}" for linear in planned if linear.path not in inputs],
        "Take it out of input_groups and list it in keep_dense: its factors could not be fitted.",
    )
    require(
        [f"{path} runs more than once per row" for path, calls in inputs.items() if len(calls) > len(subject.samples)],
        "Take it out of input_groups and list it in keep_dense: what it is given first and later are different inputs.",
    )
    block_of = {linear.group: linear.block for linear in planned}  # every group, in declared order
    require(
        [
            f"{path} does not read the input that {group[0]} reads"
            for group in block_of
            for path in group[1:]
            if not alike(inputs[path], inputs[group[0]])
        ],
        "Put it into an input group of its own, or into that of the Linears whose input it reads.",
    )
    positions = {path: number for number, path in enumerate(inputs)}
    first = {group: min(group, key=positions.__getitem__) for group in block_of}
    pairs = [(earlier, later) for earlier, later in pairwise(block_of) if block_of[earlier] == block_of[later]]
    require(
        [
            f"{first[later]} runs before {first[earlier]}, whose input group is declared before its own"
            for earlier, later in pairs
            if positions[first[later]] < positions[first[earlier]]
        ],
        "Declare input_groups in the order in which they run: error-propagating calibration follows it.",
    )


@check(input_groups)
def products(subject: TinyModel) -> None:
    """Each Linear computes its weight times its input, plus its bias."""
    forward, problems = subject.forward, []
    for path in (linear.path for linear in subject.plan.linears):
        module = subject.model.get_submodule(path)
        if not _close([times(x, module.weight, module.bias) for x in forward.inputs[path]], forward.outputs[path]):
            problems.append(f"the output of {path} is not its weight times its input, plus its bias")
    require(problems, "List the Linear in keep_dense.")


def _close(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(
        tensor.shape == other.shape and deviation(tensor, other) <= TOLERANCE
        for tensor, other in zip(some, others, strict=True)
    )


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected number."""
    scale = float(expected.detach().abs().max())
    return float((actual.detach() - expected.detach()).abs().max()) / scale if scale else float(actual.abs().max())


def tolerated(subject: TinyModel, apart: Sequence[float]) -> float:
    """Return how far apart logits may be: as far as they move if every weight changes by a rounding error."""
    if max(apart) <= TOLERANCE:
        return TOLERANCE
    model = copy.deepcopy(subject.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + _ROUNDING * torch.randn(parameter.shape, generator=generator))
        moved = [logits(model, sample) for sample in subject.samples]
    pairs = zip(moved, subject.forward.logits, strict=True)
    return max(TOLERANCE, *(deviation(changed, original) for changed, original in pairs))


def _full(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U and V of full rank whose products are a stack of matrices, (E, m, n)."""
    m, n = stack.shape[1:]
    identity = torch.eye(min(m, n)).expand(len(stack), -1, -1)
    return (identity, stack) if m <= n else (stack, identity)


def before_the_end(subject: TinyModel, paths: Collection[str]) -> list[str]:
    """Return the paths without those in the last block, unless the same path in the block before is among them.

    A stream that ends there is computed for nothing, such as the prompts' if only pictures leave the model.
    """
    *_, before, last = ["", *block_paths(subject.meta, subject.family)]
    if before.rpartition(".")[0] != last.rpartition(".")[0]:
        return list(paths)  # the last block is the only one of its list
    inside = {path: path.removeprefix(f"{last}.") for path in paths}
    return [path for path, end in inside.items() if end == path or f"{before}.{end}" in paths]


@check(products)
def outputs(subject: TinyModel) -> None:
    """The model reads every output feature of each Linear, except in streams that end with the last block."""
    unread = unread_features(subject.model, subject.samples, [linear.path for linear in subject.plan.linears])
    require(
        [
            f"nothing reads {int(unread[path].sum())} of the {len(unread[path])} output features of {path}"
            for path in before_the_end(subject, unread)
        ],
        "Its factors would be fitted to features that are thrown away: list it in keep_dense. If another setting has "
        "the model read them all, give the tiny config that setting.",
    )


@check(products)
def statistics(subject: TinyModel) -> None:
    """Weights and Grams of a streamed pass equal those of the whole model, bit for bit."""
    streamed = subject.decomposed
    candidates = subject.plan.candidates
    taps = {linear.path: linear.tap for linear in candidates}
    grams = {}
    for path, activations in observe(subject.model, subject.samples, (), taps=taps).tapped.items():
        grams[path] = Gram(taps[path], activations[0].shape[-1])
        for rows in activations:
            grams[path].add(rows)
    problems = []
    for path, gram in grams.items():
        if path not in streamed:
            problems.append(f"no streamed row reaches {path}")
        elif not torch.equal(streamed[path].weight, subject.model.get_parameter(f"{path}.weight")):
            problems.append(f"the weight of {path}, streamed, is not the one that from_pretrained loads")
        elif not torch.equal(streamed[path].gram.matrix, gram.matrix):
            problems.append(f"the statistics of {path}, streamed, are not those of a whole forward")
    require(
        problems,
        "A forward may not depend on what ran before it: look for state or randomness in the model, and for "
        "a list of blocks that no tower declares.",
    )


@check(statistics)
def full_rank(subject: TinyModel) -> str:
    """With factors of full rank, in memory, the emulator's logits equal the base's to rounding."""
    factors = subject.decomposed
    model = copy.deepcopy(subject.model)
    biases = {path: model.get_submodule(path).bias for path in factors}
    experts = [stack for stack in subject.plan.experts if stack.is_replaced]
    stacks = {stack.path: _full(matrices(model.get_submodule(stack.owner), stack.name)) for stack in experts}
    ranks = {path: factor.u.shape[1] for path, factor in factors.items()}
    LowRank().replace(model, {**ranks, **{path: u.shape[-1] for path, (u, _) in stacks.items()}})
    with torch.no_grad():
        for path, fitted in factors.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, LowRankLinear)
            layer.weight.copy_(fitted.u)
            layer.V.copy_(fitted.v)
            if layer.bias is not None:
                layer.bias.copy_(biases[path])
        for path, pair in stacks.items():
            for part, factor in zip(LowRankLinear.parts((1, 1), 1, torch.float32), pair, strict=True):
                model.get_parameter(part_name(path, part)).copy_(factor)
    try:
        actual = [logits(model, sample) for sample in subject.samples]
    except (RuntimeError, AttributeError) as error:
        raise EmlocError(
            f"The model does not run with factors instead of its Linears ({first_line(error)}).",
            "Some module uses the weight of a Linear without calling it: find it, and list that Linear in keep_dense.",
        ) from error
    apart = [deviation(row, expected) for row, expected in zip(actual, subject.forward.logits, strict=True)]
    allowed = tolerated(subject, apart)
    require(
        [
            f"the full-rank emulator's logits differ from the base's by {value:.1e} of the largest"
            for value in apart
            if not value <= allowed  # also refuses NaN
        ],
        "Some module uses the weight of a Linear without calling it, or a Linear computes more than W x + b: list it "
        "in keep_dense.",
    )
    return f"Logits differ from the base's by at most {max(apart):.0e} of the largest."
