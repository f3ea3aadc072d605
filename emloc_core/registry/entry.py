"""A registry entry: the facts about one published model, as a TOML file. Does not import torch.

An entry is data: nothing in it is executed, and its checkpoint is in the directory of its file.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, field_validator

from emloc_core.errors import EmlocError, did_you_mean, validated
from emloc_core.files.documents import read_toml, write_json
from emloc_core.settings import Settings, TrainSettings
from emloc_core.units import parse_bytes

#: The memory target that is the model's own inference memory, as in the paper.
INFERENCE = "inference"
_PUBLISHED = re.compile(r"\d+(\.\d+)?([MB]|GB)?")


class Parameters(Settings):
    """The published number of parameters of a model."""

    published: str = Field(description="As published: 7.62B, 494M, or all digits; 15.9GB for the checkpoint's bytes.")
    source: str = Field(description="Where it was published.")
    tied_twice: bool = Field(
        False, description="It counts a tied output projection twice, as the checkpoint stores it."
    )
    note: str | None = Field(None, description="Anything else that was published.")

    @field_validator("published")
    @classmethod
    def _is_number(cls, text: str) -> str:
        if not _PUBLISHED.fullmatch(text):
            raise ValueError(f"{text!r} is not a number of parameters: write 7615616512, 7.62B, 494M, or 15.9GB")
        return text


class Preset(Settings):
    """Settings for a model: the memory for tuning, and the LoRA to tune."""

    memory: str | None = Field(
        None,
        description="Memory for tuning, such as 24GB, or 'inference'; chooses the best kind of emulator for it. "
        "By default the kind is that of `emloc compress` without a memory.",
    )
    samples: int | None = Field(None, ge=1, description="Calibration rows; by default as many as the kind takes.")
    lora_targets: list[str] | None = Field(None, description="Ends of module paths; by default the family's.")
    lora_rank: int = Field(8, ge=1, description="Rank of the LoRA.")
    batch_size: int = Field(1, ge=1, description="Rows per forward pass of tuning.")
    length: int = Field(1024, ge=1, description="Tokens per row, for a memory target.")

    @field_validator("memory")
    @classmethod
    def _is_size(cls, text: str | None) -> str | None:
        if text is not None and text != INFERENCE:
            try:
                parse_bytes(text)
            except EmlocError as error:
                raise ValueError(f"{error} Or write 'inference', for what inference on the base needs.") from None
        return text

    @property
    def train(self) -> TrainSettings:
        """The settings of stage 2."""
        return TrainSettings(lora_rank=self.lora_rank, target_modules=self.lora_targets, batch_size=self.batch_size)


class Entry(Settings):
    """One model."""

    id: str = Field(min_length=1, description="Hub id, or any unique name if `checkpoint` says where the model is.")
    family: str = Field(description="Name of the family that declares it.")
    licence: str | None = Field(None, description="Licence, as on the model card.")
    revision: str | None = Field(None, description="Commit of the hub repository.")
    layout: str | None = Field(None, description="Layout of the published checkpoint, if it needs `emloc import`.")
    sources: dict[str, str] = Field({}, description="Where licence and config were published.")
    parameters: Parameters | None = None
    checkpoint: str | None = Field(None, description="Directory of the model, relative to the entry's file.")
    presets: dict[str, Preset] = Field(min_length=1, description="Presets by name; `default` is the default.")
    config: dict[str, Any] = Field(description="The architecture, as in the config.json of the native layout.")
    _file: Path = PrivateAttr(default=Path())

    @field_validator("config")
    @classmethod
    def _is_data(cls, config: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(config.get("model_type"), str):
            raise ValueError("config has no model_type")
        return config

    @property
    def file(self) -> Path:
        """The file that the entry was read from."""
        return self._file

    @property
    def name(self) -> str:
        """The id without its organisation."""
        return self.id.rpartition("/")[2]

    @property
    def model(self) -> str:
        """The MODEL argument of commands: the directory of the checkpoint, or the hub id."""
        return str((self._file.parent / self.checkpoint).resolve()) if self.checkpoint else self.id

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the entry's values (not their formatting), in hex."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def preset(self, name: str = "default") -> Preset:
        """Return a preset by name.

        Raises:
            EmlocError: there is no such preset.
        """
        if name not in self.presets:
            names = list(self.presets)
            raise EmlocError(
                f"{self.id} has no preset {name!r}: {', '.join(names)}.{did_you_mean(name, names)}",
                "Name one of these.",
            )
        return self.presets[name]

    @contextmanager
    def config_file(self) -> Iterator[Path]:
        """Write the architecture to a temporary ``config.json``; errors about it name the entry's file instead."""
        with tempfile.TemporaryDirectory(prefix="emloc-entry-") as directory:
            file = Path(directory) / "config.json"
            write_json(file, self.config)
            try:
                yield file
            except EmlocError as error:
                raise EmlocError(str(error).replace(str(file), str(self.file)), code=error.code) from error


def read_entry(file: Path) -> Entry:
    """Read one entry.

    Raises:
        EmlocError: the file is not a valid entry; names everything that is wrong, with the line if it is not TOML. Or
            its checkpoint is outside the file's directory (links are followed).
    """
    entry = validated(Entry, read_toml(file, "entry"), "Correct the entry.", str(file))
    entry._file = file.absolute()
    if entry.checkpoint and not Path(entry.model).is_relative_to(entry.file.parent.resolve()):
        raise EmlocError(f"{entry.file} names {entry.checkpoint!r}, outside its directory.", "Put it beside the entry.",
                         code="refused")  # fmt: skip
    return entry
