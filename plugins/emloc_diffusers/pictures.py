"""Pictures by a pipeline, with and without a LoRA, from the same noise; and a grid of them."""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from emloc_core.adapters.adapter import Adapter
from emloc_core.data.row import Row
from emloc_core.devices import is_accelerator
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import open_checkpoint
from emloc_core.model.device import choose_device, free_memory
from emloc_core.plugins.manager import plugin_manager
from emloc_diffusers.calls import call_of, unpacked
from emloc_diffusers.encoding import fitted
from emloc_diffusers.lora_file import FILE
from emloc_diffusers.pipeline import Parts, pipeline_of

if TYPE_CHECKING:
    from PIL.Image import Image

_GAP = 4  # pixels between the pictures of a grid
#: Steps of the solver.
STEPS = 28
#: Maximum height and width of a picture on a page, in pixels.
_SHOWN = 256


class Drawing:
    """A pipeline that draws.

    Args:
        model: directory of the pipeline, of its transformer, or of an emulator that draws instead.
        adapter: a LoRA for it.

    Raises:
        EmlocError: there is no such pipeline, or the adapter was trained on an emulator and not corrected.
    """

    def __init__(self, model: str, adapter: Path | None = None) -> None:
        checkpoint = open_checkpoint(model)
        self.call = call_of(plugin_manager().family_for(checkpoint.config).auto_class)
        self.parts = Parts(pipeline_of(checkpoint))
        self.pipe = self.parts.complete(self.call.pipelines, checkpoint)
        self.pipe.set_progress_bar_config(disable=True)
        if adapter:
            Adapter(adapter)  # refuses anything else
            if not (adapter / FILE).is_file():
                raise EmlocError(f"{adapter} has no {FILE}.", "Give an adapter that emloc wrote.", code="missing")
            with _quiet():  # it warns that there is no LoRA for the text encoders
                self.pipe.load_lora_weights(str(adapter), weight_name=FILE)
        self._move()

    def _move(self) -> None:
        """Move the pipeline to the device; part by part during computation if it does not fit on the GPU."""
        device, sizes = choose_device("auto"), [self.parts.nbytes([name]) for name in self.parts.index]
        room = free_memory() if is_accelerator(device) else sum(sizes) + 1
        if sum(sizes) < room:
            self.pipe.to(device)
        elif max(sizes) < room:
            self.pipe.enable_model_cpu_offload()
        else:
            self.pipe.enable_sequential_cpu_offload()

    def side(self, size: tuple[int, int]) -> int:
        """Return the height and width of a picture of about this size, in pixels."""
        patch = self.parts.factor * self.call.patch
        width, height = fitted(size, patch, None, "The row")
        return max(patch, min(width, height))

    def draw(
        self, prompts: Sequence[str], *, side: int, steps: int = STEPS, seed: int = 0, guidance: float | None = None
    ) -> "list[Image]":
        """Return a picture for every prompt; the noise depends only on the seed and the index in the list.

        Args:
            prompts: any number.
            side: height and width in pixels.
            steps: steps of the solver.
            seed: seed of the noise.
            guidance: guidance scale; None for the pipeline's default.
        """
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
        size = {"height": side, "width": side, "num_inference_steps": steps, "generator": generators}
        options = {"prompt": list(prompts), **self.call.drawing(self.pipe, len(prompts))}
        if guidance is not None:
            options[self.call.guidance] = guidance
        if getattr(self.pipe, "vae", None) is not None:
            return list(self.pipe(**size, **options).images)
        factor = self.pipe.vae_scale_factor  # without a VAE, latents are pixels
        size |= {"height": side * factor, "width": side * factor}
        latents = self.pipe(output_type="latent", **size, **options).images
        return [_as_image(pixels) for pixels in unpacked(latents, side, side)]


def answers(base: str, adapter: Path, rows: Sequence[Row], guidance: float | None) -> list[dict[str, str]]:
    """Return prompts, and pictures as URLs; see :meth:`emloc_core.objective.Objective.answers`."""
    drawings = {"before": Drawing(base), "after": Drawing(base, adapter)}
    rows_answered = []
    for number, row in enumerate(rows):
        assert row.images
        picture = row.images[0].read()
        side = drawings["before"].side(picture.size)
        answer = {"prompt": str(row.prompt), "expected": _url(picture)}
        for name, drawing in drawings.items():
            answer[name] = _url(drawing.draw([str(row.prompt)], side=side, seed=number, guidance=guidance)[0])
        rows_answered.append(answer)
    return rows_answered


def _url(picture: "Image") -> str:
    picture.thumbnail((_SHOWN, _SHOWN))
    content = BytesIO()
    picture.save(content, format="PNG")
    return f"data:image/png;base64,{b64encode(content.getvalue()).decode()}"


@contextmanager
def _quiet() -> Iterator[None]:
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _as_image(pixels: torch.Tensor) -> "Image":
    """Return pixels, (C, H, W), from -1 to 1, as a picture."""
    from PIL import Image

    levels = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def grid(rows: "Mapping[str, Sequence[Image]]", columns: Sequence[str], cell: int) -> "Image":
    """Return pictures in rows under their names.

    Args:
        rows: pictures by the name of their row.
        columns: headings above them.
        cell: height and width of each, in pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    left = max(int(font.getlength(name)) for name in rows) + 2 * _GAP
    top, step = 16, cell + _GAP
    sheet = Image.new("RGB", (left + step * len(columns), top + step * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, name in enumerate(columns):
        draw.text((left + index * step, 2), name, "black", font)
    for line, (name, pictures) in enumerate(rows.items()):
        draw.text((_GAP, top + line * step + cell // 2 - 6), name, "black", font)
        for index, picture in enumerate(pictures):
            sheet.paste(picture.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST if picture.width < cell
                        else Image.Resampling.LANCZOS), (left + index * step, top + line * step))  # fmt: skip
    return sheet
