"""A model directory, read lazily: config, index, shards, fingerprint. Nothing here knows what the tensors mean."""

import re
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from emloc_core.errors import EmlocError, first_line
from emloc_core.files.card import BASE_CARD, CARD
from emloc_core.files.documents import read_config, read_object
from emloc_core.files.header import TensorInfo, read_header
from emloc_core.files.hub_cache import require_cache
from emloc_core.files.inputs import Inputs
from emloc_core.files.manifest import read_manifest, require_unchanged
from emloc_core.files.own import require_own_files
from emloc_core.files.quantised import is_in_mxfp4
from emloc_core.plugins.manager import plugin_manager

#: Transformers' names of the index, and of a single file of weights.
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: The files to fetch and copy: neither pickled weights nor other formats.
FILE_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]
#: What an emulator keeps: rows and their images, without which it does not match its manifest; and a LoRA.
_KEPT = ["calibration.jsonl", "selection.jsonl", "images/*", "adapter/*"]
#: The files to read or copy from a model: also the rows that an emulator keeps.
_READ = [*FILE_PATTERNS, "*.jsonl"]
#: Suffixes of files besides the weights that affect what is made from a model; the rest is for people.
_SHAPING = {".json", ".model", ".txt", ".jinja"}
#: The files of a tokenizer or a processor, without which text and images cannot be turned into a model's inputs.
_PROCESSING = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
               "*.jinja", "chat_template.json", "*processor_config.json")  # fmt: skip
#: Copies of the same weights in other layouts.
OTHER_LAYOUTS = ["consolidated*", "original/*", "onnx/*"]
#: A plain name: not hidden, not a path, nothing special to a terminal or a shell.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,200}\.safetensors")


class Checkpoint:
    """A Hugging Face checkpoint in a local directory.

    Raises:
        EmlocError: the directory, its config or its safetensors shards are missing or damaged, or some of its files
            are links to other places.
    """

    def __init__(self, directory: str | Path, name: str | None = None) -> None:
        self.directory = Path(directory)
        #: The name that adapters for this model use: the hub id, or the absolute path.
        self.name = name or str(self.directory.absolute())
        if not self.directory.is_dir():
            raise EmlocError(
                f"{self.directory} is not a directory.", "Give the path of a model directory.", code="missing"
            )
        require_own_files(self.directory, _READ)
        if not (self.directory / "config.json").is_file():
            raise EmlocError(
                f"{self.directory} has no config.json.", "Give a Hugging Face model directory.", code="missing"
            )
        self.config = read_config_json(self.directory / "config.json")
        self.objective = plugin_manager().objective_for(self.config)
        #: The names of its single file of weights, and of the index of several.
        self.single = f"{self.objective.weights}.safetensors"
        self.index = f"{self.single}.index.json"

    def require_unquantised(self, option: str = "") -> None:
        """Refuse a checkpoint that is quantised or an emulator, since its tensors are not the weights themselves.

        Experts in MXFP4 are accepted: they are published like that, and unpacked as they are read.

        Args:
            option: the command-line option that names another checkpoint, for the message.
        """
        if (settings := self.config.get("quantization_config")) and not is_in_mxfp4(self.config):
            method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
            raise EmlocError(
                f"{self.directory} is already quantised or an emulator (method {method!r}).",
                f"Give the original, unquantised model{f' with {option}' if option else ''}.",
                code="unsupported",
            )

    @cached_property
    def shards(self) -> list[Path]:
        """The safetensors files, sorted by name."""
        return [self.directory / name for name in sorted(set(self._weight_map.values())) or [self.single]]

    @cached_property
    def _index_file(self) -> Path | None:
        # Where a single file and an index lie side by side, transformers loads the file, other libraries the shards.
        unread = self.single == SINGLE and (self.directory / SINGLE).is_file()
        index = self.directory / self.index
        return index if index.is_file() and not unread else None

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        """The index: key of a tensor -> name of its shard. Empty for a single file, which has no index."""
        index = self._index_file
        if index is None:
            if (self.directory / self.single).is_file():
                return {}
            is_pickled = any(self.directory.glob("*model*.bin"))
            fix = "Convert the pickled weights with save_pretrained." if is_pickled else "Add them."
            raise EmlocError(
                f"{self.directory} has neither {self.single} nor {self.index}: no weights in safetensors.",
                fix,
                code="missing",
            )
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise EmlocError(f"{index} has no weight_map.", "Download or copy the file again.", code="damaged")
        for key, name in weight_map.items():
            if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
                raise EmlocError(
                    f"{index} says that {key} is in {name!r}, which is not a .safetensors file beside it.",
                    "Do not use this checkpoint.",
                    code="refused",
                )
        return weight_map

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by key. Headers, index and files are checked against each other."""
        tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for key, tensor in read_header(shard)[0].items():
                if key in tensors:
                    raise EmlocError(
                        f"{tensors[key].shard} and {shard} both hold {key}.",
                        "Do not use this checkpoint.",
                        code="damaged",
                    )
                tensors[key] = tensor
        for key, name in self._weight_map.items():
            if key not in tensors or tensors[key].shard.name != name:
                raise EmlocError(
                    f"{self.directory / name} lacks {key}, which {self.index} says it holds.",
                    "Download or copy the model again.",
                    code="damaged",
                )
        return tensors

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @contextmanager
    def slices(self, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Yield lazy slices of the tensors ``keys``. The files are closed and their pages freed at the end."""
        with ExitStack() as stack:
            handles: dict[Path, Any] = {}
            slices = {}
            for key in keys:
                shard = self.tensors[key].shard
                if shard not in handles:
                    handles[shard] = stack.enter_context(safe_open(str(shard), framework="pt"))
                slices[key] = handles[shard].get_slice(key)
            yield slices

    def fingerprint(self, inputs: Inputs) -> str:
        """Return the SHA-256 over config, index and the content of every shard, as a hexadecimal string.

        The model's other files, such as its tokenizer, do not affect the hash, but are added to the inputs.

        Raises:
            EmlocError: this is an emulator whose files have changed since it was made.
        """
        inputs.hash(self.side_files())
        manifest = read_manifest(self.directory)
        if manifest is not None and manifest.get("kind") == "emulator":
            require_unchanged(manifest, self.directory, self.content_hash(inputs))
        return inputs.hash(self._model_files)

    def content_hash(self, inputs: Inputs) -> str:
        """Return the SHA-256 over all that affects what is made from the model, as in an emulator's manifest.

        In addition to :meth:`fingerprint`, it covers the tokenizer, templates, and the rows that an emulator keeps.
        """
        shaping = [path for path in self.side_files() if path.suffix in _SHAPING]
        return inputs.hash([*self._model_files, *shaping, *sorted(self.directory.glob("*.jsonl"))])

    @property
    def descriptions(self) -> list[Path]:
        """The files that say what its tensors are and where: its config, and the index of several shards."""
        return [self.directory / "config.json", *([self._index_file] if self._index_file else [])]

    @property
    def _model_files(self) -> list[Path]:
        return self.descriptions + self.shards

    def side_files(self) -> list[Path]:
        """Return the files that belong to the model besides its weights and config: tokenizer, templates, licence."""
        skipped = {"config.json", self.index, "emloc.json", "timing.json"}
        return sorted(
            path
            for path in self.directory.iterdir()
            if path.is_file()
            and path.name not in skipped
            and not path.name.startswith(".")
            and any(path.match(pattern) for pattern in FILE_PATTERNS)
            and path.suffix != ".safetensors"
        )

    def copy_side_files(self, target: Path, skip: Container[str] = ()) -> None:
        """Copy the side files into a directory; the model's card is renamed, since the directory gets its own."""
        for path in self.side_files():
            if path.name not in skip:
                name = BASE_CARD if path.name == CARD else path.name
                (target / name).write_bytes(path.read_bytes())

    def copy_processing(self, target: Path) -> None:
        """Copy the files of the tokenizer and the processor into a directory."""
        for path in self.side_files():
            if any(path.match(pattern) for pattern in _PROCESSING):
                (target / path.name).write_bytes(path.read_bytes())


def read_config_json(path: Path) -> dict[str, Any]:
    """Return the content of a model's ``config.json``; what names its architecture is its ``model_type``.

    Raises:
        EmlocError: it cannot be read, or nothing in it names an architecture.
    """
    config = read_config(path)
    model_type = config.get(plugin_manager().objective_for(config).type_key)
    if not isinstance(model_type, str):
        raise EmlocError(f"{path} has no model_type.", "Give a Hugging Face model directory, or its config.json.")
    return {**config, "model_type": model_type}


def open_checkpoint(model: str, *, cached: bool = False) -> Checkpoint:
    """Open a local model directory, or the snapshot of a hub id (fetched unless it is cached).

    ``organisation/name@revision`` is the model at that commit, tag or branch.

    Args:
        cached: fetch nothing.

    Raises:
        EmlocError: there is no such directory, and no such model could be fetched.
    """
    if Path(model).exists():
        return Checkpoint(_of_several(Path(model)))
    with _from_hub(model) as (name, revision):
        from huggingface_hub import snapshot_download

        directory = snapshot_download(
            name, revision=revision, allow_patterns=[*FILE_PATTERNS, *_KEPT], ignore_patterns=OTHER_LAYOUTS,
            local_files_only=cached,
        )  # fmt: skip
    return Checkpoint(_of_several(Path(directory)), name)


def _of_several(directory: Path) -> Path:
    """Return the directory of the model that is trained, in a directory that may hold several."""
    if not (directory / "config.json").is_file():
        for objective in plugin_manager().objectives():
            if objective.folder and (directory / objective.folder / "config.json").is_file():
                return directory / objective.folder
    return directory


def may_be_hub_id(model: str) -> bool:
    """Return whether this has the form of a hub id, and not of a path."""
    return not model.startswith((".", "/", "~")) and model.count("/") == 1


def require_name(model: str) -> None:
    """Refuse a path that does not exist; a hub id passes."""
    if not may_be_hub_id(model):
        raise EmlocError(
            f"There is no model at {model}.", "Check the path, or give a hub id (organisation/name).", code="missing"
        )


@contextmanager
def _from_hub(model: str) -> Iterator[tuple[str, str | None]]:
    """Yield the name and the revision of a model of the hub, and turn the hub's errors into an :class:`EmlocError`."""
    require_name(model)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, _, revision = model.partition("@")
    try:
        try:
            yield name, revision or None
        except (HfHubHTTPError, HFValidationError, OSError):
            raise
        except Exception as error:  # from its HTTP library or downloader: the connection was lost
            raise ConnectionError(first_line(error)) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        require_cache(error)
        reason = first_line(error)
        raise EmlocError(
            f"There is no directory {model}, and the hub has no such model or cannot be reached ({reason})",
            "Check the name; for a gated model, log in with `hf auth login`.",
            code="unavailable",
        ) from error


def find_config(model: str, *, with_tokenizer: bool = False) -> Path:
    """Return the path of a ``config.json``: itself, in a model directory, or of a hub id.

    A hub id may end in ``@revision``.

    Args:
        with_tokenizer: also fetch the files of the tokenizer and the processor; otherwise nothing else is fetched.

    Raises:
        EmlocError: there is none.
    """
    path = Path(model)
    if path.is_file():
        return path
    if path.exists():
        path = _of_several(path)
        if not (path / "config.json").is_file():
            raise EmlocError(
                f"{path} has no config.json.", "Give a Hugging Face model directory, or a config.json.", code="missing"
            )
        return path / "config.json"
    patterns = [str(Path(objective.folder, "config.json")) for objective in plugin_manager().objectives()]
    patterns += _PROCESSING if with_tokenizer else ()
    with _from_hub(model) as (name, revision):
        from huggingface_hub import snapshot_download

        directory = _of_several(Path(snapshot_download(name, revision=revision, allow_patterns=patterns)))
        if not (directory / "config.json").is_file():
            raise FileNotFoundError("it has no config.json")
    return directory / "config.json"
