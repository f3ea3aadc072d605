"""Rows as the transformer learns from them: pictures as latents, prompts as embeddings; encoded once, and cached.

The encoders are larger than many transformers, and not needed during training. Their outputs are kept in the user's
cache directory, by the content of picture, prompt and encoder.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from emloc_core.data.row import Row
from emloc_core.errors import EmlocError
from emloc_core.files.inputs import Inputs
from emloc_core.memory.cache import directory as cache_directory
from emloc_core.model.device import choose_device, free_memory
from emloc_diffusers.calls import Call
from emloc_diffusers.pipeline import Parts

#: Maximum pixels of a picture, unless the user says otherwise.
_PIXELS = 1024 * 1024


@dataclass(frozen=True)
class Encoded:
    """A row as the transformer learns from it.

    Attributes:
        row: its name, for messages.
        latents: (C, h, w), fp32.
        prompt: tensors by name, without batch.
        weight: its weight in the loss.
        key: key of its content.
    """

    row: str
    latents: torch.Tensor
    prompt: Mapping[str, torch.Tensor]
    weight: float
    key: str

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shapes that rows of one forward pass must share."""
        return tuple(self.latents.shape), *(tuple(tensor.shape) for tensor in self.prompt.values())


class Encoder:
    """Encodes rows for a transformer.

    Args:
        parts: parts of its pipeline. Without a VAE, the transformer learns the pixels themselves.
        call: how it is called.
        config: its config.
        tokens: maximum patches of a picture; larger ones are scaled down. None means a million pixels.
    """

    def __init__(self, parts: Parts, call: Call, config: Mapping[str, Any], tokens: int | None) -> None:
        self.parts, self.call, self.config, self.tokens = parts, call, config, tokens
        room, largest = free_memory(), max(self.parts.nbytes(self.parts.readers), self.parts.nbytes(["vae"]))
        self.device = choose_device("auto" if largest < room else "cpu")

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Return the encoded rows.

        Raises:
            EmlocError: a picture cannot be read, or is smaller than a patch; or a part cannot be loaded.
        """
        directory = cache_directory()
        if directory is None:
            with TemporaryDirectory() as temporary:
                return self._encode(rows, Path(temporary))
        directory = directory / "encoded"
        directory.mkdir(parents=True, exist_ok=True)
        return self._encode(rows, directory)

    def _encode(self, rows: Sequence[Row], directory: Path) -> list[Encoded]:
        files = Inputs(directory)
        readers = files.hash(file for name in self.parts.readers for file in self.parts.files(name))
        drawn = files.hash(self.parts.files("vae")) if self.parts.has("vae") else "pixels"
        size = f"{self.tokens}-{self.call.channels(self.config)}-{self.call.patch}"
        prompts = [directory / f"{_digest(self.parts.class_name, readers, row.prompt)}.safetensors" for row in rows]
        pictures = [directory / f"{_digest(drawn, size, _image(row).sha256)}.safetensors" for row in rows]
        if missing := {path: row for path, row in zip(prompts, rows, strict=True) if not path.exists()}:
            with self.parts.reading(self.call.pipelines, self.device) as pipe, torch.no_grad():
                for path, row in missing.items():
                    prompt = self.call.prompt(pipe, str(row.prompt))
                    _write({name: tensor.cpu() for name, tensor in prompt.items()}, path)
        if missing := {path: row for path, row in zip(pictures, rows, strict=True) if not path.exists()}:
            vae = self.parts.load("vae").to(self.device) if self.parts.has("vae") else None
            with torch.no_grad():
                for path, row in missing.items():
                    _write({"latents": self._latents(row, vae)}, path)
        return [
            Encoded(row.name, load_file(picture)["latents"], load_file(prompt), row.weight, row.key)
            for row, picture, prompt in zip(rows, pictures, prompts, strict=True)
        ]

    def _latents(self, row: Row, vae: Any) -> torch.Tensor:
        """Return a picture as latents, (C, h, w), on the CPU."""
        pixels = self._pixels(row, self.parts.factor)
        if vae is None:
            return pixels
        batch = pixels[None].to(self.device, vae.dtype)
        latents = vae.encode(batch[:, :, None] if _is_for_films(vae) else batch).latent_dist.mode()
        return normalised(latents, vae)[0].float().cpu()

    def _pixels(self, row: Row, factor: int) -> torch.Tensor:
        """Return a picture, (C, H, W), from -1 to 1: scaled down to the maximum of patches, and cut to whole ones."""
        import numpy

        image = _image(row).read()
        if factor == 1 and self.call.channels(self.config) == 1:
            image = image.convert("L")
        side = factor * self.call.patch  # of a patch, in pixels
        scale = _scale(image.size, side, self.tokens)
        width, height = fitted(image.size, side, self.tokens, row.name)
        if scale < 1:
            image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        array = numpy.asarray(image.crop((left, top, left + width, top + height)), dtype=numpy.float32)
        pixels = torch.from_numpy(array.reshape(height, width, -1)).permute(2, 0, 1) / 127.5 - 1
        if factor == 1 and len(pixels) != self.call.channels(self.config):
            raise EmlocError(
                f"{row.name}: its picture has {len(pixels)} channels, but the transformer learns "
                f"{self.call.channels(self.config)}, of a pipeline without a VAE.",
                "Give the whole pipeline.",
            )
        return pixels.contiguous()


def _scale(size: tuple[int, int], side: int, patches: int | None) -> float:
    most = _PIXELS if patches is None else patches * side * side
    return min(1.0, (most / (size[0] * size[1])) ** 0.5)


def fitted(size: tuple[int, int], side: int, patches: int | None, name: str) -> tuple[int, int]:
    """Return the width and height of a picture, scaled down to the maximum of patches, and cut to whole ones.

    Args:
        size: its width and height, in pixels.
        side: side of a patch, in pixels.
        patches: maximum number; None means a million pixels.
        name: name of its row.

    Raises:
        EmlocError: it is smaller than a patch.
    """
    scale = _scale(size, side, patches)
    width, height = (int(length * scale + 1e-6) // side * side for length in size)
    if not width or not height:
        raise EmlocError(f"{name}: its picture is smaller than a patch of {side} pixels.", "Leave it out.")
    return width, height


def patches(row: Row, side: int, most: int | None) -> int:
    """Return the number of patches of a row's picture, scaled and cut as in :func:`fitted`."""
    width, height = fitted(_image(row).read().size, side, most, row.name)
    return width * height // side**2


def normalised(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """Return latents of a VAE as transformers learn them: (B, C, h, w)."""
    config = vae.config
    if _is_for_films(vae):
        spread = (config.latents_mean, config.latents_std)
        mean, std = (torch.tensor(values).to(latents).view(1, -1, 1, 1, 1) for values in spread)
        return ((latents - mean) / std)[:, :, 0]
    if _packs(vae):
        b, c, h, w = latents.shape
        latents = (
            latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
        )
        mean, variance = (
            statistic.view(1, -1, 1, 1).to(latents) for statistic in (vae.bn.running_mean, vae.bn.running_var)
        )
        return (latents - mean) / (variance + config.batch_norm_eps).sqrt()
    return (latents - (config.shift_factor or 0)) * config.scaling_factor


def _is_for_films(vae: Any) -> bool:
    """Return whether a VAE encodes films; a picture is then a film of one frame."""
    return hasattr(vae, "temperal_downsample")  # diffusers' own spelling


def _packs(vae: Any) -> bool:
    """Return whether patches of 2 x 2 latents are normalised as one."""
    return hasattr(vae, "bn")


def _image(row: Row) -> Any:
    assert row.images
    return row.images[0]


def _digest(*values: Any) -> str:
    return hashlib.sha256("\0".join(map(str, values)).encode()).hexdigest()


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors under a temporary name, and rename the file when it is complete."""
    unfinished = path.with_suffix(f".{torch.randint(1 << 30, ()).item()}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
    unfinished.rename(path)
