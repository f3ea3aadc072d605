"""Names of ComfyUI and kohya's scripts, read again by diffusers' own loaders of such files."""

import re

import diffusers
import pytest
import torch
from emloc_diffusers.comfyui import renamed
from emloc_diffusers.families import FAMILIES, FLUX, SD3
from emloc_diffusers.lora_file import FILE
from safetensors.torch import load_file
from support.pipelines import flux_pipeline, picture_rows

import emloc_core as emloc
from emloc_core.algorithms.lora import Lora
from emloc_core.errors import EmlocError

LOADERS = {
    "flux": "FluxPipeline",
    "flux2": "Flux2Pipeline",
    "qwen-image": "QwenImagePipeline",
    "z-image": "ZImagePipeline",
}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.name, marks=() if family is FLUX else pytest.mark.thorough)
        for family in FAMILIES
        if family is not SD3
    ],
)
def test_diffusers_reads_the_same_lora_from_these_names(family):
    few = {name: value for name, value in family.tiny_configs[0].items() if name != "model_type"}
    if family is FLUX:  # whose widths the reader expects
        few = {"num_layers": 1, "num_single_layers": 1}
    with torch.device("meta"):
        model = getattr(diffusers, family.auto_class)(**few)
    ends = tuple(f".{target}" for target in family.lora_targets())
    linears = {path: module for path, module in model.named_modules() if f".{path}".endswith(ends)}
    loras = {path: Lora(torch.randn(2, linear.in_features), torch.randn(linear.out_features, 2), 1.0)
             for path, linear in linears.items()}  # fmt: skip
    named = renamed(family.auto_class, loras, lambda path: linears[path].out_features)
    state = getattr(diffusers, LOADERS[family.name]).lora_state_dict(named)
    state = state[0] if isinstance(state, tuple) else state
    factors = {key.removeprefix("transformer.").removesuffix(".lora_A.weight"):
               (state[key.replace("lora_A", "lora_B")], a) for key, a in state.items() if "lora_A" in key}  # fmt: skip
    assert factors.keys() == loras.keys()
    for path, lora in loras.items():  # the products themselves are large
        (b, a), x = factors[path], torch.randn(linears[path].in_features, 2)
        assert torch.allclose(b @ (a @ x), lora.b @ (lora.a @ x), rtol=1e-4, atol=1e-3), path


def test_what_has_no_lora_in_a_joined_matrix_gets_none():
    lora = Lora(torch.randn(2, 8), torch.randn(8, 2), 1.0)
    named = renamed("FluxTransformer2DModel", {"transformer_blocks.0.attn.to_k": lora}, lambda _: 8)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    product = named[f"{name}.lora_up.weight"] @ named[f"{name}.lora_down.weight"]
    assert torch.allclose(product[8:16], lora.b @ lora.a)
    assert not product[:8].any()
    assert not product[16:].any()
    assert named[f"{name}.alpha"] == 6


class Checkpoint(dict):
    """Weights as they were first published; those that do not matter are zero."""

    def pop(self, key):
        return super().pop(key, torch.zeros(6))


def test_the_names_of_stable_diffusion_3_are_those_of_its_own_weights():
    """By the reader of its published checkpoints, as diffusers has none of such LoRAs."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers  # imports scipy

    ends = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
            "attn.to_out.0", "attn.to_add_out", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
            "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear"]  # fmt: skip
    blocks = [f"transformer_blocks.{index}.{end}" for index in range(2) for end in ends]
    loras = {path: Lora(torch.randn(2, 8), torch.randn(6, 2), 1.0) for path in blocks if ".1.attn.to_add" not in path
             and ".1.ff_context" not in path}  # fmt: skip
    named = renamed("SD3Transformer2DModel", loras, lambda _: 6)
    weights = Checkpoint({"context_embedder.weight": torch.zeros(6, 6)})
    for name in {key.partition(".")[0] for key in named}:
        index, stream, part = re.fullmatch(r"lora_unet_joint_blocks_(\d)_(x|context)_block_(.+)", name).groups()
        part = part.replace("_1", ".1") if part.startswith("ada") else part.replace("_", ".")
        product = named[f"{name}.lora_up.weight"] @ named[f"{name}.lora_down.weight"]
        weights[f"joint_blocks.{index}.{stream}_block.{part}.weight"] = product
    read = convert_sd3_transformer_checkpoint_to_diffusers(weights)
    assert all(torch.allclose(read[f"{path}.weight"], lora.b @ lora.a, atol=1e-5) for path, lora in loras.items())
    with pytest.raises(EmlocError, match="no matrix like"):
        renamed("SD3Transformer2DModel", {"transformer_blocks.0.norm1_context.linear": loras[blocks[0]]}, lambda _: 6)


def test_a_class_without_known_names_is_refused():
    with pytest.raises(EmlocError, match="not known what ComfyUI calls"):
        renamed("PixArtTransformer2DModel", {}, lambda _: 8)


def test_an_adapter_is_exported(tmp_path):
    pipeline, rows = flux_pipeline(tmp_path / "pipeline", FLUX.tiny_configs[0]), picture_rows(tmp_path / "rows", 4)
    adapter = emloc.train(str(pipeline), rows, str(tmp_path / "adapter"), steps=2, batch_size=2, lora_rank=2)
    exported = emloc.export(adapter, tmp_path / "exported", comfyui=True)
    assert exported.result["warnings"] == []
    written, ours = load_file(exported.path / "lora.safetensors"), load_file(adapter.path / FILE)
    name, path = "lora_unet_single_blocks_1_linear1", "transformer.single_transformer_blocks.1"
    product = written[f"{name}.lora_up.weight"] @ written[f"{name}.lora_down.weight"]
    parts = [ours[f"{path}.{end}.lora_B.weight"] @ ours[f"{path}.{end}.lora_A.weight"]
             for end in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]  # fmt: skip
    assert torch.allclose(product, torch.cat(parts), atol=1e-6)
    assert len(written) == 3 * (2 * 8 + 2)  # eight matrices in each of two blocks, and one in each of two
    with pytest.raises(EmlocError, match="does not write GGUF"):
        emloc.export(adapter, tmp_path / "never", comfyui=True, gguf=True)
