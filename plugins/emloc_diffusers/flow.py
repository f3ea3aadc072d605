"""Flow matching: pictures with noise in them, and the velocity from the pictures to the noise.

As in diffusers' scripts: the share of noise is drawn uniformly or logit-normally, shifted as the pipeline's scheduler
does, and the mean squared error of the velocity is not weighted by it (Esser et al., 2024, arXiv 2403.03206).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel

from emloc_core.objective import Purpose
from emloc_diffusers.calls import Call, Tensors
from emloc_diffusers.encoding import Encoded

#: Draws of noise and time for every row. Modulations read one vector per draw, whatever the picture's size.
DRAWS: Mapping[Purpose, int] = {"calibration": 16, "selection": 8, "evaluation": 8}


@dataclass(frozen=True)
class Times:
    """How the share of noise is drawn.

    Attributes:
        density: ``uniform`` or ``logit-normal``.
        shift: the scheduler's shift; above 1, there is more noise.
    """

    density: str
    shift: float = 1.0

    @classmethod
    def for_call(cls, call: Call, scheduler: Mapping[str, Any]) -> "Times":
        """Return the times of a class with a pipeline's scheduler; a shift that depends on the picture is left out."""
        fixed = not scheduler.get("use_dynamic_shifting", False)
        return cls(call.density, float(scheduler.get("shift", 1.0)) if fixed else 1.0)

    def shares(self, uniform: torch.Tensor) -> torch.Tensor:
        """Return the shares of noise from uniform numbers between 0 and 1."""
        share = torch.sigmoid(torch.special.ndtri(uniform)) if self.density == "logit-normal" else uniform
        return self.shift * share / (1 + (self.shift - 1) * share)


def squared_error(
    model: Any,
    call: Call,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    prompt: Tensors,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Return the weighted mean squared error of each picture, (B,), fp32.

    Args:
        model: the transformer, with or without a LoRA, or its wrapper for several processes.
        call: how it is called.
        latents, noise: (B, C, h, w).
        sigma, weight: (B,).
        prompt: tensors by name, (B, ...).
    """
    output = forward(model, call, latents, noise, sigma, prompt)
    error = (call.answer(output).float() - call.target(noise - latents).float()).square()
    return weight * error.flatten(1).mean(1)


def forward(
    model: Any, call: Call, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, prompt: Tensors
) -> Any:
    """Pass noisy pictures through the model; see :func:`squared_error`."""
    share, plain = sigma.view(-1, 1, 1, 1), extract_model_from_parallel(model)
    noisy = ((1 - share) * latents + share * noise).to(plain.dtype)
    embeddings = {
        name: tensor.to(plain.dtype) if tensor.is_floating_point() else tensor for name, tensor in prompt.items()
    }
    return model(**call.arguments(noisy, sigma, embeddings, plain.config), return_dict=False)


@dataclass(frozen=True)
class Drawn:
    """A row with noise, for one forward pass. See :class:`emloc_core.objective.Sample`.

    Attributes:
        encoded: the row.
        call: how the transformer is called.
        sigma: the share of noise.
        seed: seed of the noise.
    """

    encoded: Encoded
    call: Call
    sigma: float
    seed: int

    @property
    def row(self) -> str:
        """The name of the row, for messages."""
        return self.encoded.row

    @property
    def others(self) -> Tensors:
        """The prompt."""
        return self.encoded.prompt

    @property
    def size(self) -> int:
        """Patches of the picture."""
        _, height, width = self.encoded.latents.shape
        return height * width // self.call.patch**2

    def inputs(self, device: torch.device | str) -> dict[str, torch.Tensor]:
        """Return picture, noise, its share, and the prompt, each as a batch of one."""
        generator = torch.Generator().manual_seed(self.seed)
        latents = self.encoded.latents[None]
        drawn = {"noise": torch.randn(latents.shape, generator=generator), "sigma": torch.tensor([self.sigma])}
        prompt = {name: tensor[None] for name, tensor in self.encoded.prompt.items()}
        return {name: tensor.to(device) for name, tensor in {"latents": latents, **drawn, **prompt}.items()}

    def run(self, model: Any, device: torch.device | str) -> torch.Tensor:
        """Return the model's output."""
        return self.call.answer(forward(model, self.call, **self._split(device)))

    def loss(self, model: Any, device: torch.device | str) -> torch.Tensor:
        """Return the weighted mean squared error, and 1."""
        inputs = self._split(device)
        weight = torch.tensor([self.encoded.weight], device=device)
        error = squared_error(model, self.call, weight=weight, **inputs)
        return torch.tensor([float(error), 1], dtype=torch.float64)

    def _split(self, device: torch.device | str) -> dict[str, Any]:
        prompt: dict[str, Any] = self.inputs(device)
        drawn = {name: prompt.pop(name) for name in ("latents", "noise", "sigma")}
        return {**drawn, "prompt": prompt}


def draws(encoded: Sequence[Encoded], call: Call, times: Times, count: int, purpose: str) -> list[Drawn]:
    """Return ``count`` draws of every row, whose times are spread over the whole range.

    They depend only on the row's content and the purpose.
    """
    drawn = []
    for row in encoded:
        seed = int.from_bytes(hashlib.sha256(f"{purpose}:{row.key}".encode()).digest()[:6])
        uniform = (torch.arange(count) + torch.rand(count, generator=torch.Generator().manual_seed(seed))) / count
        sigmas = times.shares(uniform.clamp(1e-4, 1 - 1e-4)).tolist()
        drawn += [Drawn(row, call, sigma, seed + 1 + index) for index, sigma in enumerate(sigmas)]
    return drawn
