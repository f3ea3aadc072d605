"""The Qwen families: the text models Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE, and Qwen-VL with its vision tower."""

from emloc_core.family import Family
from emloc_core.hookspecs import hookimpl
from emloc_core.layout import Gguf
from emloc_qwen.text import GGUF, QWEN, QWEN_MOE
from emloc_qwen.vision import QWEN_VL


@hookimpl
def emloc_families() -> list[Family]:
    """Declare the families."""
    return [QWEN, QWEN_MOE, QWEN_VL]


@hookimpl
def emloc_gguf() -> list[Gguf]:
    """Declare how they are written for llama.cpp."""
    return [GGUF]
