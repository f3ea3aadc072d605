"""How the transformers of diffusers are called: noisy pictures, prompts and times as each class takes them.

There is one class here for each class of diffusers. Pictures are latents of shape (B, C, h, w), ``sigma`` is the share
of noise in them, (B,), 0 to 1, and prompts are tensors by name, (B, ...). The model's output is compared with
``noise - pictures``, the velocity of flow matching (Esser et al., 2024, arXiv 2403.03206).
"""

from collections.abc import Mapping
from typing import Any

import torch

from emloc_core.errors import EmlocError

#: The guidance at which guidance-distilled models are tuned, as in diffusers' scripts.
GUIDANCE = 3.5
Tensors = Mapping[str, torch.Tensor]


#: Parameters of published models that encode prompts.
CLIP_L, CLIP_G, T5_XXL = 123_060_480, 694_659_840, 4_762_310_656
QWEN_VL, MISTRAL = 8_292_166_656, 24_011_361_280
#: Qwen3 by the width of its hidden states.
QWEN3 = {2560: 4_022_468_096, 4096: 8_190_735_360}


class Call:
    """How a class is called, with what most classes have in common.

    Attributes:
        pipelines: the classes of pipelines that the class is part of.
        density: how times are drawn, as in diffusers' scripts: ``uniform`` or ``logit-normal``.
        patch: sides of pictures are multiples of this many latents.
        guidance: the pipelines' name of this option.
    """

    pipelines: tuple[str, ...]
    density = "uniform"
    patch = 2
    guidance = "guidance_scale"

    def channels(self, config: Mapping[str, Any]) -> int:
        """Return C, the channels of pictures as latents."""
        return int(config["in_channels"])

    def readers(self, config: Mapping[str, Any]) -> int:
        """Return the published number of parameters of all prompt encoders together."""
        raise NotImplementedError

    def drawing(self, pipe: Any, prompts: int = 1) -> dict[str, Any]:
        """Return options of the pipeline's call for this number of prompts, encoded as in :meth:`prompt`."""
        return {}

    def prompt(self, pipe: Any, text: str) -> dict[str, torch.Tensor]:
        """Return one prompt as the pipeline encodes it: tensors without batch."""
        raise NotImplementedError

    def arguments(
        self, noisy: torch.Tensor, sigma: torch.Tensor, prompt: Tensors, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of a forward pass."""
        raise NotImplementedError

    def answer(self, output: Any) -> torch.Tensor:
        """Return the result of a forward pass, in the shape of :meth:`target`."""
        return output[0]

    def target(self, velocity: torch.Tensor) -> torch.Tensor:
        """Return the expected result, from ``noise - pictures``, (B, C, h, w)."""
        return velocity

    def made_up(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a prompt of five tokens, for tiny models."""
        return {"tokens": (5, config["joint_attention_dim"])}


class Packed(Call):
    """The call of a class that takes pictures as :func:`packed`."""

    def channels(self, config: Mapping[str, Any]) -> int:
        """Return C: the channels of a patch of 2 x 2, divided by its 4 latents."""
        return super().channels(config) // 4

    def target(self, velocity: torch.Tensor) -> torch.Tensor:
        """Return the velocity packed."""
        return packed(velocity)


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Return patches of 2 x 2 latents as tokens: (B, h/2 * w/2, 4 C)."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpacked(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the latents, (B, C, h, w), that :func:`packed` took; height and width are the latents'."""
    rows, _, channels = tokens.shape
    grid = tokens.reshape(rows, height // 2, width // 2, channels // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels // 4, height, width)


def positions(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return the positions of height x width patches: (height * width, 3), the first coordinate 0."""
    grid = torch.zeros(height, width, 3, device=device)
    grid[..., 1] += torch.arange(height, device=device)[:, None]
    grid[..., 2] += torch.arange(width, device=device)[None]
    return grid.reshape(-1, 3)


class Flux(Packed):
    """FLUX.1: packed pictures, time from 0 to 1, and also a pooled prompt."""

    pipelines = ("FluxPipeline",)

    def readers(self, config: Mapping[str, Any]) -> int:
        return CLIP_L + T5_XXL

    def drawing(self, pipe: Any, prompts: int = 1) -> dict[str, Any]:
        return {"max_sequence_length": min(512, pipe.tokenizer_2.model_max_length)}

    def prompt(self, pipe: Any, text: str) -> dict[str, torch.Tensor]:
        tokens, pooled, _ = pipe.encode_prompt(text, text, **self.drawing(pipe))
        return {"tokens": tokens[0], "pooled": pooled[0]}

    def arguments(
        self, noisy: torch.Tensor, sigma: torch.Tensor, prompt: Tensors, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        guided = {"guidance": torch.full_like(sigma, GUIDANCE)} if config.get("guidance_embeds") else {}
        height, width = noisy.shape[2] // 2, noisy.shape[3] // 2
        return {
            "hidden_states": packed(noisy),
            "timestep": sigma,
            "encoder_hidden_states": prompt["tokens"],
            "pooled_projections": prompt["pooled"],
            "txt_ids": torch.zeros(prompt["tokens"].shape[1], 3, device=noisy.device),
            "img_ids": positions(height, width, noisy.device),
            **guided,
        }

    def made_up(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return super().made_up(config) | {"pooled": (config["pooled_projection_dim"],)}


class Flux2(Call):
    """FLUX.2: the VAE packs the pictures; positions have four coordinates, of which prompts use the last."""

    pipelines, patch = ("Flux2Pipeline", "Flux2KleinPipeline"), 1

    def readers(self, config: Mapping[str, Any]) -> int:
        return QWEN3.get(config["joint_attention_dim"] // 3, MISTRAL)  # three layers' hidden states, side by side

    def prompt(self, pipe: Any, text: str) -> dict[str, torch.Tensor]:
        return {"tokens": pipe.encode_prompt(text)[0][0]}

    def arguments(
        self, noisy: torch.Tensor, sigma: torch.Tensor, prompt: Tensors, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        guided = config.get("guidance_embeds", True)
        rows, length, device = len(noisy), prompt["tokens"].shape[1], noisy.device
        of_patches = torch.nn.functional.pad(positions(noisy.shape[2], noisy.shape[3], device), (0, 1))
        of_tokens = torch.nn.functional.pad(torch.arange(length, device=device)[:, None].float(), (3, 0))
        return {
            "hidden_states": noisy.flatten(2).mT,
            "timestep": sigma,
            "guidance": torch.full_like(sigma, GUIDANCE) if guided else None,
            "encoder_hidden_states": prompt["tokens"],
            "txt_ids": of_tokens.expand(rows, -1, -1),
            "img_ids": of_patches.expand(rows, -1, -1),
        }

    def target(self, velocity: torch.Tensor) -> torch.Tensor:
        return velocity.flatten(2).mT


class StableDiffusion3(Call):
    """Stable Diffusion 3 and 3.5: time from 0 to 1000; the model packs the pictures itself."""

    pipelines, density = ("StableDiffusion3Pipeline",), "logit-normal"

    def readers(self, config: Mapping[str, Any]) -> int:
        return CLIP_L + CLIP_G + T5_XXL

    def prompt(self, pipe: Any, text: str) -> dict[str, torch.Tensor]:
        tokens, _, pooled, _ = pipe.encode_prompt(text, text, text, do_classifier_free_guidance=False)
        return {"tokens": tokens[0], "pooled": pooled[0]}

    def arguments(
        self, noisy: torch.Tensor, sigma: torch.Tensor, prompt: Tensors, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {
            "hidden_states": noisy,
            "timestep": 1000 * sigma,
            "encoder_hidden_states": prompt["tokens"],
            "pooled_projections": prompt["pooled"],
        }

    def made_up(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return super().made_up(config) | {"pooled": (config["pooled_projection_dim"],)}


class QwenImage(Packed):
    """Qwen-Image: packed pictures, whose shapes are passed to the model; prompts are not padded."""

    pipelines, guidance = ("QwenImagePipeline",), "true_cfg_scale"

    def readers(self, config: Mapping[str, Any]) -> int:
        return QWEN_VL

    def drawing(self, pipe: Any, prompts: int = 1) -> dict[str, Any]:
        return {"negative_prompt": [" "] * prompts}  # without one there is no guidance

    def prompt(self, pipe: Any, text: str) -> dict[str, torch.Tensor]:
        return {"tokens": pipe.encode_prompt(text)[0][0]}

    def arguments(
        self, noisy: torch.Tensor, sigma: torch.Tensor, prompt: Tensors, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {
            "hidden_states": packed(noisy),
            "timestep": sigma,
            "encoder_hidden_states": prompt["tokens"],
            "img_shapes": [[(1, noisy.shape[2] // 2, noisy.shape[3] // 2)]] * len(noisy),
        }


class ZImage(Call):
    """Z-Image: lists of pictures and prompts; time is reversed (noise at 0), and so is the output's sign."""

    pipelines = ("ZImagePipeline",)

    def readers(self, config: Mapping[str, Any]) -> int:
        return QWEN3[2560]

    def prompt(self, pipe: Any, text: str) -> dict[str, torch.Tensor]:
        return {"tokens": pipe.encode_prompt(text, do_classifier_free_guidance=False)[0][0]}

    def arguments(
        self, noisy: torch.Tensor, sigma: torch.Tensor, prompt: Tensors, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {"x": list(noisy[:, :, None]), "t": 1 - sigma, "cap_feats": list(prompt["tokens"])}

    def answer(self, output: Any) -> torch.Tensor:
        return torch.stack(list(output[0]))[:, :, 0]

    def target(self, velocity: torch.Tensor) -> torch.Tensor:
        return -velocity

    def made_up(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"tokens": (5, config["cap_feat_dim"])}


_CALLS: dict[str, Call] = {
    "FluxTransformer2DModel": Flux(),
    "Flux2Transformer2DModel": Flux2(),
    "SD3Transformer2DModel": StableDiffusion3(),
    "QwenImageTransformer2DModel": QwenImage(),
    "ZImageTransformer2DModel": ZImage(),
}


def call_of(class_name: str) -> Call:
    """Return how a class of diffusers is called.

    Raises:
        EmlocError: the class is not known.
    """
    if class_name not in _CALLS:
        raise EmlocError(
            f"{class_name} is not among the models that draw: {', '.join(_CALLS)}.",
            "Give a pipeline's directory, or its transformer's.",
        )
    return _CALLS[class_name]
