"""Tiny transformers, with made-up pictures and prompts."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from emloc_core.data.images import Picture
from emloc_core.data.row import Row
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_diffusers.calls import call_of
from emloc_diffusers.encoding import Encoded
from emloc_diffusers.flow import Drawn, Times, draws, forward
from emloc_diffusers.pretrained import library, load_part
from emloc_diffusers.transformer import Config

#: Height and width of pictures, in latents: two shapes, because positions depend on them.
_SHAPES = ((8, 8), (4, 8))
#: Draws of each.
_DRAWS = 2


class FlowTrial:
    """See :class:`emloc_core.objective.Trial`."""

    def has_class(self, name: str) -> bool:
        """Return whether diffusers has the class."""
        return hasattr(getattr(library(), name, None), "from_config")

    def config(self, settings: Mapping[str, Any]) -> Config:
        """Return diffusers' config."""
        if "model_type" not in settings:
            raise EmlocError("A tiny config has no model_type.", "Declare the class in diffusers.")
        fields = {name: value for name, value in settings.items() if name != "model_type"}
        return Config({"_class_name": settings["model_type"], **fields})

    def samples(self, family: Family, config: Mapping[str, Any]) -> list[Drawn]:
        """Return draws of made-up pictures and prompts."""
        call = call_of(family.auto_class)
        numbers = torch.Generator().manual_seed(0)
        rows = []
        for index, shape in enumerate(_SHAPES):
            latents = torch.randn(call.channels(config), *shape, generator=numbers)
            prompt = {name: torch.randn(*size, generator=numbers) for name, size in call.made_up(config).items()}
            rows.append(Encoded(index + 1, latents, prompt, 1.0, str(index)))
        return draws(rows, call, Times(call.density), _DRAWS, "trial")

    def rows(self, samples: Sequence[Any]) -> list[Row]:
        """Return a row with a placeholder picture for each sample."""
        from PIL import Image

        content = BytesIO()
        Image.new("RGB", (8, 8)).save(content, format="PNG")
        picture = Picture.from_source(content.getvalue(), Path())
        return [Row(index + 1, prompt=f"picture {index}", images=(picture,)) for index in range(len(samples))]

    def save(self, model: Any, _config: Any, directory: Path) -> None:
        """Write only the model: the samples are encoded already."""
        model.save_pretrained(directory)

    def load(self, family: Family, directory: Path) -> Any:
        """Return the model or emulator in memory."""
        model = load_part("diffusers", family.auto_class, directory)
        model.name_or_path = str(directory)  # PEFT records it in a LoRA
        return model

    def unpacked(self, model: Any) -> Any:
        """Return an emulator with ordinary Linears."""
        return model.dequantize()

    def loss(self, model: Any, sample: Drawn) -> torch.Tensor:
        """Return the mean squared error of the velocity."""
        inputs: dict[str, Any] = sample.inputs("cpu")
        drawn = {name: inputs.pop(name) for name in ("latents", "noise", "sigma")}
        output = forward(model, sample.call, **drawn, prompt=inputs)
        target = sample.call.target(drawn["noise"] - drawn["latents"])
        return (sample.call.answer(output).float() - target).square().mean()
