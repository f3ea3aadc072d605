"""Compiles all of Triton's kernels for real cards, without one: ``python -m support.kernels CAPABILITY...``.

In a process of its own, since that of the tests has Triton's interpreter run them.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from emloc_core.algorithms import kernels as rounding
from emloc_core.algorithms.scales import GROUP
from emloc_core.algorithms.trellis import SEGMENT, STATE_BITS
from emloc_core.standins import kernels as unpacking


def sources():
    """Yield every kernel as it is called: its name, and its source with types and constants."""
    grid = {"levels": "*fp32", "middles": "*fp32", "scales": "*fp32", "originals": "*fp32"}
    sizes = {"m": "i32", "k": "i32", "width": "i32"}
    block = {"block": "*fp32", "changes": "*fp32", "factor": "*fp32", "positions": "*i64"}
    descent = {"block": "*fp32", "slopes": "*fp32", "changes": "*fp32", "curvature": "*fp32", "start": "i32"}
    for count, kept_type in (16, "*i1"), (4, "*fp32"):
        types = grid | {"kept": kept_type} | sizes
        values = {"LEVELS": count, "KEPT": kept_type == "*i1", "COLUMNS": 64, "ROWS": 32}
        yield f"round {count}", ASTSource(rounding._round, block | types, values), 1
        yield f"descend {count}", ASTSource(rounding._descend, descent | types, values), 1
    for dtype in "bf16", "fp16", "fp32":
        types = {"codes": "*u8", "scales": "*bf16", "levels": f"*{dtype}", "matrix": f"*{dtype}"}
        types |= {"nbytes": "i32", "m": "i32", "n": "i32", "groups": "i32"}
        values = {"GROUP": GROUP, "BLOCK": 1024}
        yield f"unpack levels {dtype}", ASTSource(unpacking._unpack_levels, types, values), 4
        types = {"table" if name == "levels" else name: pointer for name, pointer in types.items()}
        values = {"COUNT": 3, "SEGMENT": SEGMENT, "STATES": 1 << STATE_BITS, "GROUP": GROUP, "BLOCK": 1024}
        yield f"unpack trellis {dtype}", ASTSource(unpacking._unpack_trellis, types, values), 4


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for name, source, warps in sources():
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
            print(capability, name, len(compiled.asm["cubin"]), compiled.metadata.shared)
