"""Compiles all of Triton's kernels for real cards, without one: ``python -m support.kernels [--few] TARGET...``.

A target is a compute capability, such as 90, or an architecture of AMD, such as gfx942. What is launched is recorded,
so that types, alignments, constants and warps are the toolkit's own. It prints a line of JSON for each kernel and
target. In a process of its own, since that of the tests has Triton's interpreter run the kernels.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter

import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from emloc_core.algorithms import kernels as rounding
from emloc_core.algorithms.grid import Grid
from emloc_core.algorithms.native import COLUMNS
from emloc_core.algorithms.scales import GROUP
from emloc_core.algorithms.trellis import COUNT
from emloc_core.standins import kernels as unpacking

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: A matrix of Llama-3.1-8B; one group; rows that are no multiple of 16 bytes; a single number.
SHAPES = (14336, 4096), (96, GROUP), (96, 500), (97, 301), (1, 1)
#: Levels, numbers that share a scale, and whether some stay.
GRIDS = (16, 1, False), (16, 1, True), (6, GROUP, False), (4, GROUP, False)
#: Rows, and columns of a block: all or some of them.
BLOCKS = (96, COLUMNS), (97, COLUMNS), (96, 48), (97, 37), (1, 1)


def unpack(name, dtype, m, n):
    """Unpack without contents; see :mod:`emloc_core.standins.kernels`."""
    groups = torch.empty(m, -(-n // GROUP), dtype=torch.bfloat16)
    if name == "trellis":
        unpacking.unpack_trellis(torch.empty(-(-m // COUNT), n, dtype=torch.uint8), groups, dtype, m, n)
    else:
        unpacking.unpack_levels(torch.empty(-(-m * n // 4), 1, dtype=torch.uint8), groups, dtype, m, n)


def round_columns(name, count, width, stay, m, k):
    """Round zeros; see :mod:`emloc_core.algorithms.kernels`."""
    kept = (torch.zeros(k, m, dtype=torch.bool), torch.zeros(k, m)) if stay else None
    grid = Grid(torch.linspace(-1, 1, count), torch.ones(-(-k // width), m), width, kept)
    block, weights = torch.zeros(k, m), torch.zeros(k, k)
    if name == "round":
        rounding.round_block(block, block.clone(), weights, torch.arange(k), grid)
    else:
        rounding.descend_block(block, block.clone(), block.clone(), weights, 0, grid)


def launches(few=False):
    """Return what is launched: the kernel's name, the instantiation in words, function, arguments, options, grid."""
    recorded, described = [], []

    def record(kernel, *args, grid, warmup, **options):  # noqa: ARG001
        recorded.append((*described, kernel, args, options, grid))

    run, JITFunction.run = JITFunction.run, record
    try:
        for name in "trellis", "levels":
            for dtype in ("bf16",) if few else DTYPES:
                for m, n in (SHAPES[0], SHAPES[3]) if few else SHAPES:
                    described[:] = name, f"{dtype}, {m} x {n}"
                    unpack(name, DTYPES[dtype], m, n)
        for name in "round", "descend":
            for count, width, stay in GRIDS[::3] if few else GRIDS:
                for m, k in (BLOCKS[1], BLOCKS[3]) if few else BLOCKS:
                    described[:] = name, f"{count} levels, {k} columns, {m} rows" + (", some stay" if stay else "")
                    round_columns(name, count, width, stay, m, k)
    finally:
        JITFunction.run = run
    return recorded


def compiled(kernel, args, options, target):
    """Compile a launch as Triton does: a size of 1 is a constant, and multiples of 16 are known as such."""
    backend = make_backend(target)
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    types, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        kind, known = "constexpr", None
        if not parameter.is_constexpr:
            kind, known = native_specialize_impl(type(backend), value, False, True, True)
        types[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif known:
            attributes[index,] = backend.parse_attr(known)
    return triton.compile(ASTSource(kernel, types, constants, attributes), target=target, options=values)


def of_ptx(ptx, capability):
    """Return registers, bytes that are spilled, and how many loads and stores there are, by their bytes."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = re.search(r"\.target ([a-z0-9_]+)", ptx)[1]
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    moves = {"ld": Counter(), "st": Counter()}
    for kind, count, bits in re.findall(r"\b(ld|st)\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        moves[kind][int(count or 1) * int(bits) // 8] += 1
    return {
        "registers": int(re.search(r"Used (\d+) registers", output)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", output))),
        "loads": moves["ld"],
        "stores": moves["st"],
    }


def of_gcn(text):
    """Return registers and bytes that are spilled from vector registers."""
    registers, spilled = (int(re.search(rf"\.vgpr{name}:\s+(\d+)", text)[1]) for name in ("_count", "_spill_count"))
    return {"registers": registers, "spilled": 4 * spilled}


def figures(launch, target):
    """Return what the compiled code takes."""
    name, words, kernel, args, options, grid = launch
    cuda = target.isdecimal()
    code = compiled(kernel, args, options, GPUTarget("cuda", int(target), 32) if cuda else GPUTarget("hip", target, 64))
    read = of_ptx(code.asm["ptx"], int(target)) if cuda else of_gcn(code.asm["amdgcn"])
    row = {"kernel": name, "instantiation": words, "target": target, **read, "shared": code.metadata.shared}
    if name in ("trellis", "levels"):
        matrix = next(tensor for tensor in args[:4] if tensor.shape[-2:] == torch.Size(args[5:7]))
        moved = sum(tensor.nbytes for tensor in (args[0], args[1], matrix))
        row |= {"weights": matrix.numel(), "bytes": moved, "programs": math.prod(grid)}
    return row


if __name__ == "__main__":
    few, targets = "--few" in sys.argv, [argument for argument in sys.argv[1:] if argument != "--few"]
    for launch in launches(few):
        for target in targets:
            print(json.dumps(figures(launch, target)), flush=True)
