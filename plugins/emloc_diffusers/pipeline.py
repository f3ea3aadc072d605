"""The pipeline that a transformer belongs to: its encoders, and how times are spaced.

A pipeline's directory has a ``model_index.json`` and a folder per part; the transformer is one of them. An emulator
uses the pipeline of its base.
"""

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint, open_checkpoint
from emloc_core.files.documents import read_object
from emloc_core.files.manifest import input_name, read_manifest
from emloc_core.model.skeleton import most_common_dtype
from emloc_diffusers.pretrained import library, load_part
from emloc_diffusers.transformer import read_config

INDEX = "model_index.json"
#: The parts that read prompts.
_READERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


def pipeline_of(checkpoint: Checkpoint) -> Path:
    """Return the directory of the pipeline that a transformer, or the base of an emulator, is part of.

    Raises:
        EmlocError: it is not part of a pipeline.
    """
    directory = checkpoint.directory.absolute()
    manifest = read_manifest(directory)
    if manifest is not None and manifest.get("kind") == "emulator":
        directory = open_checkpoint(input_name(directory, "base")).directory.absolute()
    if not (directory.parent / INDEX).is_file():
        raise EmlocError(
            f"{directory} is not part of a pipeline, so pictures and prompts cannot be encoded.",
            f"Give the directory of the pipeline, with its {INDEX}, or the transformer in it.",
            code="missing",
        )
    return directory.parent


class Parts:
    """The parts of a pipeline, except its transformer.

    Args:
        directory: directory of the pipeline.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = read_object(directory / INDEX)
        #: The class of the pipeline.
        self.class_name = str(self.index.get("_class_name"))

    def has(self, name: str) -> bool:
        """Return whether the pipeline has this part."""
        entry = self.index.get(name)
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    @property
    def readers(self) -> list[str]:
        """The names of the parts that read prompts."""
        return [name for name in _READERS if self.has(name)]

    def files(self, name: str) -> list[Path]:
        """Return the files of a part that affect its results."""
        return sorted(path for path in (self.directory / name).iterdir() if path.suffix in (".json", ".safetensors",
                      ".model", ".txt"))  # fmt: skip

    def nbytes(self, names: Sequence[str]) -> int:
        """Return the total bytes of these parts, without missing ones."""
        files = [file for name in names if self.has(name) for file in self.files(name)]
        return sum(file.stat().st_size for file in files)

    @property
    def factor(self) -> int:
        """The width of a latent in pixels: 1 without a VAE, since the transformer learns the pixels themselves."""
        if not self.has("vae"):
            return 1
        config = read_object(self.directory / "vae" / "config.json")
        # Diffusers' spelling, in VAEs that encode films; a picture is a film of one frame.
        of_films = config.get("temperal_downsample")
        halved = len(config["block_out_channels"][1:] if of_films is None else of_films)
        return 2 ** (halved + ("batch_norm_eps" in config))  # which normalises patches of 2 x 2 latents as one

    def load(self, name: str) -> Any:
        """Return a part; see :func:`emloc_diffusers.pretrained.load_part`."""
        owner, class_name = self.index[name]
        return load_part(str(owner), str(class_name), self.directory / name)

    @contextmanager
    def reading(self, classes: Sequence[str], device: torch.device) -> Iterator[Any]:
        """Yield the pipeline with only its prompt encoders, on a device; it is dropped at the end.

        Args:
            classes: the allowed classes of the pipeline.
            device: where to encode.

        Raises:
            EmlocError: the pipeline has another class, or a part cannot be loaded.
        """
        pipe = self._build(classes, self.readers).to(device)
        # Without a T5, its embeddings are zeros of the width that the transformer's config says.
        config = read_config(self.directory / "transformer" / "config.json")
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(**config))
        yield pipe

    def complete(self, classes: Sequence[str], transformer: Checkpoint) -> Any:
        """Return the pipeline with a transformer, all of it in the transformer's dtype.

        Args:
            classes: the allowed classes of the pipeline.
            transformer: its own, or an emulator of it.

        Raises:
            EmlocError: the pipeline has another class, or a part cannot be loaded.
        """
        stored = read_config(transformer.directory / "config.json").dtype
        dtype = stored or most_common_dtype(transformer.tensors.values())
        model = load_part("diffusers", self.index["transformer"][1], transformer.directory, dtype)
        names = [name for name in self.index if self.has(name) and name != "transformer"]
        pipe = self._build(classes, names, transformer=model)
        for component in pipe.components.values():
            if isinstance(component, nn.Module) and component is not model:  # the scales of an emulator keep their own
                component.to(dtype)
        return pipe

    def _build(self, classes: Sequence[str], names: Sequence[str], **components: Any) -> Any:
        """Return the pipeline with the given components, and the parts of these names; the others are None."""
        if self.class_name not in classes:
            raise EmlocError(
                f"{self.directory} is a {self.class_name}; pictures can only be learned with {', '.join(classes)}.",
                "Give another pipeline.",
                code="unsupported",
            )
        kind = getattr(library(), self.class_name)
        parameters = inspect.signature(kind.__init__).parameters
        settings = {
            name: value for name, value in self.index.items() if name in parameters and not isinstance(value, list)
        }
        arguments = {**settings, **components, **{name: self.load(name) for name in names if name in parameters}}
        missing = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty and name not in ("self", *arguments)
        ]
        return kind(**dict.fromkeys(missing), **arguments)

    def scheduler(self) -> dict[str, Any]:
        """Return the config of the scheduler."""
        path = self.directory / "scheduler" / "scheduler_config.json"
        return json.loads(path.read_text()) if path.is_file() else {}
