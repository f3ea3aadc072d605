"""A LoRA by the names that ComfyUI and kohya's scripts read: those of the models as they were first published.

Some of those matrices are several of diffusers' stacked vertically. Their LoRAs become one, whose B has a block for
each. Every LoRA has an ``alpha`` equal to its rank, which is a scale of 1.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch

from emloc_core.algorithms.lora import Lora
from emloc_core.errors import EmlocError

#: The matrices of a block, and the matrices of diffusers in each, by the ends of their paths.
Names = Mapping[str, Sequence[str]]
_STREAMS: Names = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
}
#: By class, and by its list of blocks: the list's name in other tools, and the names in a block.
_NAMES: dict[str, dict[str, tuple[str, Names]]] = {
    "FluxTransformer2DModel": {
        "transformer_blocks": (
            "double_blocks",
            {
                **_STREAMS,
                "img_mlp_0": ("ff.net.0.proj",),
                "img_mlp_2": ("ff.net.2",),
                "txt_mlp_0": ("ff_context.net.0.proj",),
                "txt_mlp_2": ("ff_context.net.2",),
                "img_mod_lin": ("norm1.linear",),
                "txt_mod_lin": ("norm1_context.linear",),
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "linear2": ("proj_out",),
                "modulation_lin": ("norm.linear",),
            },
        ),
    },
    "Flux2Transformer2DModel": {
        "transformer_blocks": (
            "double_blocks",
            {
                **_STREAMS,
                "img_mlp_0": ("ff.linear_in",),
                "img_mlp_2": ("ff.linear_out",),
                "txt_mlp_0": ("ff_context.linear_in",),
                "txt_mlp_2": ("ff_context.linear_out",),
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
        ),
    },
    "SD3Transformer2DModel": {
        "transformer_blocks": (
            "joint_blocks",
            {
                "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "x_block_attn_proj": ("attn.to_out.0",),
                "context_block_attn_proj": ("attn.to_add_out",),
                "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block_attn2_proj": ("attn2.to_out.0",),
                "x_block_mlp_fc1": ("ff.net.0.proj",),
                "x_block_mlp_fc2": ("ff.net.2",),
                "context_block_mlp_fc1": ("ff_context.net.0.proj",),
                "context_block_mlp_fc2": ("ff_context.net.2",),
                "x_block_adaLN_modulation_1": ("norm1.linear",),  # the prompts' has other halves in the last block
            },
        ),
    },
}
_PATH = re.compile(r"(\w+)\.(\d+)\.(.+)")


def renamed(class_name: str, loras: Mapping[str, Lora], rows: Callable[[str], int]) -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA by the names that others read.

    Args:
        class_name: class of the transformer.
        loras: LoRAs by path; all of one rank, and of scale 1.
        rows: returns the rows of the weight at a path.

    Raises:
        EmlocError: the names for such a model are not known, or the LoRA is on a matrix that has none.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, paths in _joined(class_name, loras).items():
        present = [loras[path] for path in paths if path in loras]
        b = torch.block_diag(*(loras[path].b if path in loras else present[0].b.new_zeros(rows(path), present[0].rank)
                               for path in paths))  # fmt: skip
        a = torch.cat([loras[path].a if path in loras else torch.zeros_like(present[0].a) for path in paths])
        tensors[f"{name}.lora_down.weight"] = a.contiguous()
        tensors[f"{name}.lora_up.weight"] = b.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(len(a)))
    return tensors


def _joined(class_name: str, loras: Mapping[str, Lora]) -> dict[str, Sequence[str]]:
    """Return the paths whose LoRAs are joined, by the name of the result."""
    if class_name == "QwenImageTransformer2DModel":
        return {f"lora_unet_{path.replace('.', '_')}": [path] for path in loras}
    if class_name == "ZImageTransformer2DModel":
        return {f"diffusion_model.{path}": [path] for path in loras}
    if class_name not in _NAMES:
        raise EmlocError(
            f"It is not known what ComfyUI calls the matrices of a {class_name}.",
            "Give it the adapter's pytorch_lora_weights.safetensors.",
            code="unsupported",
        )
    joined: dict[str, Sequence[str]] = {}
    for path in loras:
        match = _PATH.fullmatch(path)
        blocks, names = _NAMES[class_name].get(match[1], ("", {})) if match else ("", {})
        name = next((name for name, ends in names.items() if match and match[3] in ends), None)
        if match is None or name is None:
            raise EmlocError(f"ComfyUI has no matrix like {path}.", "Tune other modules, with --target-modules.")
        paths = [f"{match[1]}.{match[2]}.{end}" for end in names[name]]
        joined[f"lora_unet_{blocks}_{match[2]}_{name}"] = paths
    return joined
