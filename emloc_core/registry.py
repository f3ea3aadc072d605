"""The registry: what is known of published models, one TOML file each, so that planning needs no network.

Entries are data. They come from the package itself, from plugins, and from files of the user; nothing in one is
executed, and a path in one stays in the directory of its file. Imports no torch.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from emloc_core.budget import parse_bytes
from emloc_core.errors import EmlocError, did_you_mean
from emloc_core.output import write_json
from emloc_core.plugins import plugin_manager
from emloc_core.settings import CompressSettings, Settings, explain
from emloc_core.training import TrainSettings

#: Where the entries of the package lie: in a wheel, and in a checkout.
_PACKAGED = (Path(__file__).parent / "models", Path(__file__).parent.parent / "registry")
#: A memory target that depends on the model: what inference on it needs, as in the paper.
INFERENCE = "inference"
#: Fields of a config by which transformers would fetch code, or run it.
_CODE = {"auto_map", "attn_implementation", "experts_implementation", "custom_pipelines", "trust_remote_code"}
_GLOB = re.compile(r"[*?\[]")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([MB]?)")


class Parameters(Settings):
    """How many parameters a model has, as it was published.

    Attributes:
        digits: how many significant digits were published.
    """

    published: str = Field(description="As it was written: 7.62B, 494M, or all digits.")
    source: str = Field(description="Where it was written.")
    note: str | None = Field(None, description="What is counted otherwise than here, and what was published besides.")

    @field_validator("published")
    @classmethod
    def _is_number(cls, text: str) -> str:
        if not _NUMBER.fullmatch(text):
            raise ValueError("write a number with an optional M or B: 7.62B, 494M, 7615616512")
        return text

    @property
    def digits(self) -> int:
        """How many significant digits were published."""
        return len(self.published.rstrip("MB").replace(".", "").lstrip("0"))

    @property
    def count(self) -> int:
        """The published number, in parameters."""
        number, unit = _NUMBER.fullmatch(self.published).groups()  # type: ignore[union-attr]
        return round(float(number) * {"": 1, "M": 10**6, "B": 10**9}[unit])

    def agree(self, count: int) -> bool:
        """Say whether a count, rounded to the published digits, is what was published."""
        return float(f"{count:.{self.digits - 1}e}") == float(f"{self.count:.{self.digits - 1}e}")


class Preset(Settings):
    """How large an emulator is made, and what is tuned on it: a ratio, or the memory that tuning may use."""

    ratio: float | None = Field(None, gt=0, lt=1, description="Share of the compressed Linears' parameters.")
    memory: str | None = Field(None, description="What tuning may use: 24GB, say, or 'inference'.")
    samples: int = Field(64, ge=1, description="Calibration rows.")
    lora_targets: list[str] | None = Field(None, description="Ends of module paths; by default the family's.")
    lora_rank: int = Field(8, ge=1, description="Rank of the LoRA.")
    batch_size: int = Field(1, ge=1, description="Rows of the workload that a memory target is meant for.")
    length: int = Field(1024, ge=1, description="Tokens a row of that workload.")

    @model_validator(mode="after")
    def _one_size(self) -> "Preset":
        if (self.ratio is None) == (self.memory is None):
            raise ValueError("a preset has either a ratio or a memory target")
        return self

    @field_validator("memory")
    @classmethod
    def _is_size(cls, text: str | None) -> str | None:
        if text is not None and text != INFERENCE:
            try:
                parse_bytes(text)
            except EmlocError as error:
                raise ValueError(str(error)) from None
        return text

    def compress_settings(self, ratio: float | None = None) -> CompressSettings:
        """Return the settings of stage 1, with the preset's ratio, or the one found for its memory target."""
        chosen = self.ratio if ratio is None else ratio
        if chosen is None:
            raise EmlocError(f"The ratio for {self.memory} has not been found yet.", "See emloc_core.presets.")
        return CompressSettings(ratio=chosen, samples=self.samples)

    def train_settings(self) -> TrainSettings:
        """Return the settings of stage 2."""
        return TrainSettings(
            lora_rank=self.lora_rank, target_modules=self.lora_targets, batch_size=self.batch_size,
            max_length=self.length,
        )  # fmt: skip


class Data(Settings):
    """An entry's own rows: files, by paths relative to the entry's, within its directory."""

    train: str = Field(description="Rows for calibration, selection and tuning.")
    calibration: str | None = Field(None, description="Other rows for calibration and selection.")
    test: list[str] = Field([], description="Rows that are never tuned on.")
    tasks: list[str] = Field([], description="Task files of lm-eval, to compare on.")


class Entry(Settings):
    """One model."""

    id: str = Field(description="Hub id, or any unique name where `checkpoint` says where the model is.")
    family: str = Field(description="Name of the family that declares it.")
    licence: str | None = Field(None, description="As its card names it.")
    revision: str | None = Field(None, description="Commit of the hub's repository.")
    layout: str | None = Field(None, description="Of the published checkpoint, where `emloc import` has to rewrite it.")
    sources: dict[str, str] = Field({}, description="Where licence and config were published.")
    parameters: Parameters | None = None
    checkpoint: str | None = Field(None, description="Directory of the model, relative to the entry's file.")
    data: Data | None = None
    presets: dict[str, Preset] = Field(min_length=1)
    config: dict[str, Any] = Field(description="The architecture, as in config.json.")
    _file: Path = PrivateAttr(default=Path())

    @field_validator("config")
    @classmethod
    def _is_data(cls, config: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(config.get("model_type"), str):
            raise ValueError("config has no model_type")
        for name in _names(config):
            if name in _CODE or name.startswith("_"):
                raise ValueError(f"config.{name} could make transformers run code that is not its own; leave it out")
        return config

    @property
    def file(self) -> Path:
        """The file that the entry was read from."""
        return self._file

    @property
    def directory(self) -> Path:
        """The directory that the entry's paths are relative to and do not leave."""
        return self._file.parent

    @property
    def model(self) -> str:
        """What commands are given as MODEL: the entry's own directory, or the hub id."""
        return str(self.path(self.checkpoint)) if self.checkpoint else self.id

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the entry says, as hexadecimal digits."""
        said = json.dumps(self.model_dump(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(said.encode()).hexdigest()

    def path(self, relative: str) -> Path:
        """Return the absolute path of a file that the entry names.

        Raises:
            EmlocError: it is outside the entry's directory, by a link too.
        """
        directory = self.directory.resolve()
        path = (directory / relative).resolve()
        if Path(relative).is_absolute() or not path.is_relative_to(directory):
            raise EmlocError(
                f"{self.file} names {relative!r}, outside its directory.", "Put the file beside the entry."
            )
        return path

    def preset(self, name: str) -> Preset:
        """Return a preset by name.

        Raises:
            EmlocError: there is none.
        """
        if name not in self.presets:
            known = list(self.presets)
            raise EmlocError(f"{self.id} has no preset {name!r}: {', '.join(known)}.{did_you_mean(name, known)}")
        return self.presets[name]

    def write_config(self, directory: Path) -> Path:
        """Write the architecture as ``config.json`` into a directory, for what plans from such a file."""
        file = directory / "config.json"
        write_json(file, self.config)
        return file

    def paths(self) -> list[str]:
        """Return all relative paths that the entry names."""
        data = [self.data.train, self.data.calibration, *self.data.test, *self.data.tasks] if self.data else []
        return [path for path in (self.checkpoint, *data) if path is not None]


def load_entries(extra: Iterable[str | Path] = ()) -> list[Entry]:
    """Return all entries by id: the package's, the plugins', and those of the user's files and directories.

    A plugin whose entries cannot be used is set aside, and the others are returned.

    Raises:
        EmlocError: a file of the user is no entry, or has the id of another entry.
    """
    entries: dict[str, Entry] = {}
    _add(entries, _read_all([next(place for place in _PACKAGED if place.is_dir())]))
    manager = plugin_manager()
    for owner, paths in manager.registries():
        try:
            _add(entries, _read_all(paths))
        except Exception as error:
            manager.set_aside(owner, error)
    _add(entries, _read_all(Path(path) for path in extra))
    return sorted(entries.values(), key=lambda entry: entry.id.lower())


def find(pattern: str, entries: Sequence[Entry] | None = None) -> list[Entry]:
    """Return the entries whose id, or its part behind the organisation, matches a glob. Case does not count.

    Args:
        pattern: an id, a name, or a glob of either: ``Qwen/Qwen2.5-7B``, ``Qwen2.5-*``.
        entries: among these; by default :func:`load_entries`.

    Raises:
        EmlocError: none does.
    """
    among = load_entries() if entries is None else entries
    found = [entry for entry in among if any(fnmatchcase(name, pattern.lower()) for name in _called(entry.id))]
    if not found:
        what = "matches" if _GLOB.search(pattern) else "is called"
        meant = did_you_mean(pattern, [entry.id for entry in among] + [entry.id.split("/")[-1] for entry in among])
        raise EmlocError(f"No entry of the registry {what} {pattern!r}.{meant}", "`emloc zoo list` shows all.")
    return found


def read_entry(file: Path) -> Entry:
    """Read one entry.

    Raises:
        EmlocError: the file is no entry; all that is wrong is named, with its line where it is no TOML.
    """
    try:
        entry = Entry(**tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise EmlocError(f"{file} cannot be read ({error.strerror}).", "Give an entry, a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EmlocError(f"{file} is not valid TOML: {error}.", "Mend the line that it names.") from None
    except ValidationError as error:
        raise EmlocError(f"{file}: {explain(error, Entry)}", "Mend the entry.") from None
    entry._file = file.absolute()
    for path in entry.paths():
        entry.path(path)
    return entry


def _read_all(paths: Iterable[Path]) -> Iterator[Entry]:
    for path in paths:
        if path.is_dir():
            yield from map(read_entry, sorted(path.glob("*.toml")))
        else:
            yield read_entry(path)


def _add(entries: dict[str, Entry], more: Iterable[Entry]) -> None:
    """Add entries, all or none."""
    added: dict[str, Entry] = {}
    for entry in more:
        other = entries.get(entry.id) or added.get(entry.id)
        if other is not None and other.file.resolve() != entry.file.resolve():
            raise EmlocError(
                f"{entry.file} and {other.file} are both entries of {entry.id!r}.", "Rename or remove one of them."
            )
        added[entry.id] = entry
    entries.update(added)


def _called(name: str) -> tuple[str, str]:
    return name.lower(), name.lower().rpartition("/")[2]


def _names(config: Mapping[str, Any]) -> Iterator[str]:
    for name, value in config.items():
        yield name
        if isinstance(value, Mapping):
            yield from _names(value)
