"""The Qwen family: the dense text models Qwen2, Qwen2.5 and Qwen3.

Their Linears stand where Llama's do; q/k/v have biases in Qwen2, and Qwen3 normalises queries and keys instead.
"""

from dataclasses import replace

from emloc_llama import LLAMA, TINY

from emloc_core.family import Family
from emloc_core.hookspecs import hookimpl

QWEN = replace(
    LLAMA,
    name="qwen",
    model_types=frozenset({"qwen2", "qwen3"}),
    tiny_configs=[
        {"model_type": "qwen2", **TINY, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {"model_type": "qwen3", **TINY, "head_dim": 8},
    ],
)


@hookimpl
def emloc_families() -> list[Family]:
    """Declare the family."""
    return [QWEN]
