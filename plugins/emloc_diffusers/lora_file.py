"""A LoRA in the form that ``load_lora_weights`` of diffusers' pipelines reads exactly.

Keys begin with ``transformer.``, and the scale is folded into B: pipelines assume scale 1 for a LoRA without ``alpha``.
A directory in PEFT's format raises a KeyError there, and keys without the prefix are ignored.
"""

from pathlib import Path

from safetensors.torch import save_file

from emloc_core.adapters.adapter import Adapter

FILE = "pytorch_lora_weights.safetensors"


def write_for_pipelines(directory: Path) -> None:
    """Write the LoRA of a directory in PEFT's format beside it, in its own dtype."""
    tensors = {}
    for path, lora in Adapter(directory).loras.items():
        tensors[f"transformer.{path}.lora_A.weight"] = lora.a.contiguous()
        tensors[f"transformer.{path}.lora_B.weight"] = (lora.b * lora.scale).to(lora.b.dtype).contiguous()
    save_file(tensors, directory / FILE, {"format": "pt"})
