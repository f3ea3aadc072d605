"""A PEFT LoRA directory: reading, checking that it can be transferred to the base, and writing."""

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from emloc_core.adapters.dense import Replacement, replacements
from emloc_core.adapters.expert_keys import by_stack, in_file, is_single
from emloc_core.algorithms.lora import Lora, flattened, of_experts
from emloc_core.errors import EmlocError, explain
from emloc_core.files.documents import read_object, write_json
from emloc_core.files.header import read_header
from emloc_core.files.inputs import Inputs
from emloc_core.files.lora import CONFIG, WEIGHTS, require_lora
from emloc_core.files.manifest import input_name, manifest_value, read_manifest, require_unchanged
from emloc_core.files.own import require_own_files
from emloc_core.files.patterns import pattern_problems
from emloc_core.files.shards import write_shard
from emloc_core.standins.transfer import REMEDY, field_problems

CORRECTED = "emloc.corrected"  # key in the weights' metadata, which remains if the manifest is lost
_PREFIX = "base_model.model."
_NONE: Mapping[str, torch.Tensor] = {}
#: Kinds of directory that hold an adapter -> key of its model in the manifest's request.
_MADE_FOR = {"adapter": "model", "corrected-adapter": "base", "served-adapter": "base"}


class _Scale(BaseModel, strict=True):
    """The fields of PEFT's config that a LoRA's scale is computed from."""

    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    r: PositiveInt = 8
    use_rslora: bool = False
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    rank_pattern: dict[str, PositiveInt] | None = None


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Return the reasons why a LoRA with this PEFT config cannot be transferred to the base; empty if it can."""
    problems = field_problems(config)
    if config.get("peft_type") != "LORA":
        return problems
    try:
        _Scale.model_validate(config)
    except ValidationError as error:
        problems.append(explain(error, _Scale).removesuffix("."))
    return [*problems, *pattern_problems(config)]


class Adapter:
    """A LoRA that PEFT saved.

    Raises:
        EmlocError: the directory is not a PEFT adapter, or cannot be transferred; the message lists the reasons.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        require_lora(self.directory)
        require_own_files(self.directory, [CONFIG, WEIGHTS, "*.json"])
        self.config: dict[str, Any] = read_object(self.directory / CONFIG)
        if problems := config_problems(self.config):
            raise EmlocError(
                f"The adapter {self.directory} cannot be used: {'; '.join(problems)}.", REMEDY, code="unsupported"
            )
        name = self.config.get("base_model_name_or_path")
        self._model_name = name if isinstance(name, str) else ""
        self.manifest = read_manifest(self.directory) or {}
        if not self.manifest:
            return
        kind = manifest_value(self.manifest, self.directory, "kind", str)
        if kind not in _MADE_FOR:
            raise EmlocError(f"{self.directory} holds {kind!r}, not an adapter.", "Give the directory of an adapter.")
        manifest_value(self.manifest, self.directory, f"request.{_MADE_FOR[kind]}", str)

    @property
    def model_name(self) -> str:
        """Path or hub id of the model that its config names: the one it was trained on, or corrected for.

        Raises:
            EmlocError: it names none.
        """
        if not self._model_name:
            raise EmlocError(
                f"{self.directory} does not name the model that it was trained on.",
                f"Name it in {CONFIG} (base_model_name_or_path). Or give an emulator to `emloc correct` with "
                "--emulator, or the base to `emloc merge` with --base.",
                code="missing",
            )
        return self._model_name

    @property
    def is_corrected(self) -> bool:
        """Whether it is for a base, and not for an emulator: corrected, or exported as it was."""
        if self.manifest.get("kind") in ("corrected-adapter", "served-adapter"):
            return True
        return CORRECTED in read_header(self.directory / WEIGHTS)[1]

    @property
    def trained_on(self) -> Path | None:
        """The directory of the model that its config names, if it exists. A corrected adapter names its base."""
        directory = Path(self._model_name)
        return directory if self._model_name and (directory / "config.json").is_file() else None

    @property
    def base_name(self) -> str:
        """Path or hub id of the base that it is for.

        Raises:
            EmlocError: it was trained on an emulator that does not name its base.
        """
        directory = self.trained_on
        if directory and (read_manifest(directory) or {}).get("kind") == "emulator":
            return input_name(directory, "base")
        return self.model_name

    def fingerprint(self, files: Inputs) -> str:
        """Return the SHA-256 over config and weights, as :func:`fingerprint` does."""
        return fingerprint(self.directory, files)

    @cached_property
    def loras(self) -> dict[str, Lora]:
        """The LoRA of every Linear, by module path, and of every stack of experts, by its parameter's path; sorted.

        Raises:
            EmlocError: there are tensors that do not match the config, or NaN.
        """
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in self._tensors.items():
            path, half, name = key.partition(".lora_")
            if half and (name not in ("A.weight", "B.weight") or tensor.ndim != 2):
                raise self._no_lora(key)
            if half:
                parts.setdefault(path, {})[name[0]] = tensor
        if incomplete := [path for path, pair in parts.items() if len(pair) != 2]:
            raise EmlocError(
                f"The LoRA in {self.directory} on {incomplete[0]} lacks one of its two matrices.",
                "Train again.",
                code="damaged",
            )
        _ = self.replaced  # refuses tensors that are neither
        stacks = by_stack(parts, self.config.get("target_parameters") or [])
        linears = parts.keys() - {in_file(path) for path in stacks}
        loras = {path: self._lora(path, parts[path]["A"], parts[path]["B"]) for path in linears}
        loras |= {path: self._lora(path, pair["A"], pair["B"], stacked=True) for path, pair in stacks.items()}
        return dict(sorted(loras.items()))

    @cached_property
    def replaced(self) -> dict[str, Replacement]:
        """Replacements of the embeddings and the output layer, by module path.

        Raises:
            EmlocError: as for :attr:`loras`.
        """
        return replacements(self.others, self.config.get("trainable_token_indices"))

    @property
    def others(self) -> dict[str, torch.Tensor]:
        """The tensors that belong to no LoRA, as they are in the file."""
        return {key: tensor for key, tensor in self._tensors.items() if ".lora_" not in key}

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by their keys, without PEFT's prefix."""
        read_header(self.directory / WEIGHTS)
        if self.manifest:
            require_unchanged(self.manifest, self.directory, content_hash(self.directory))
        try:
            tensors = load_file(self.directory / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise EmlocError(
                f"{self.directory / WEIGHTS} cannot be read ({error}).",
                "Copy the file again, or train again.",
                code="damaged",
            ) from None
        stripped = {}
        for key, tensor in tensors.items():
            if key.endswith(".base_layer.weight"):  # PEFT's frozen copy of an output projection that has a LoRA
                continue
            if not key.startswith(_PREFIX):
                raise self._no_lora(key)
            if not tensor.is_floating_point():
                raise EmlocError(
                    f"{key} in {self.directory} has dtype {tensor.dtype}, which is not floating-point.",
                    "Save the adapter in float32 or bfloat16, or train again.",
                )
            if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):  # NaN and Inf survive a sum
                raise EmlocError(
                    f"{key} in {self.directory} holds NaN or Inf.",
                    "Train again, with a lower learning rate.",
                    code="not-finite",
                )
            stripped[key.removeprefix(_PREFIX)] = tensor
        if not stripped:
            raise EmlocError(
                f"{self.directory / WEIGHTS} holds no LoRA.", "Copy the file again, or train again.", code="damaged"
            )
        return stripped

    def _no_lora(self, key: str) -> EmlocError:
        return EmlocError(
            f"{self.directory / WEIGHTS} holds {key}, which is not part of a LoRA on a Linear.",
            "Train an ordinary LoRA on Linears only.",
            code="unsupported",
        )

    def _lora(self, path: str, a: torch.Tensor, b: torch.Tensor, *, stacked: bool = False) -> Lora:
        rank = self._pattern_value("rank_pattern", path, self.config.get("r", 8))
        if a.shape[0] != b.shape[1] or (a.shape[0] % rank if stacked else a.shape[0] != rank):
            if not stacked and is_single(path, self.config.get("target_parameters") or []):
                raise EmlocError(
                    f"The adapter {self.directory} has a LoRA on one stack of experts only, in {path}.",
                    "Put one on both, gate_up_proj (or up_proj) and down_proj.",
                    code="unsupported",
                )
            raise EmlocError(
                f"The LoRA in {self.directory} on {path} has the shapes {tuple(a.shape)} and {tuple(b.shape)}; "
                f"{CONFIG} says rank {rank}.",
                "Copy both files again, or train again.",
                code="mismatch",
            )
        alpha = self._pattern_value("alpha_pattern", path, self.config["lora_alpha"])
        scale = alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
        if not 0 < scale <= torch.finfo(torch.float32).max:
            raise EmlocError(
                f"The LoRA in {self.directory} on {path} has the scale {scale:g}, which fp32 cannot represent.",
                "Correct its lora_alpha.",
            )
        return of_experts(a, b, scale, rank) if stacked else Lora(a, b, scale)

    def _pattern_value(self, name: str, path: str, default: Any) -> Any:
        """Return the number for the Linear at ``path``; patterns match as in PEFT."""
        from peft.utils.other import get_pattern_key

        pattern = self.config.get(name) or {}
        return pattern.get(get_pattern_key(list(pattern), path), default)


def content_hash(directory: Path) -> str:
    """Return the SHA-256 over an adapter, as in a manifest's result.

    The path of its model does not count: the config may be edited when the model has moved.
    """
    config = {**read_object(directory / CONFIG), "base_model_name_or_path": None}
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(f"{text}\n{Inputs().hash([directory / WEIGHTS])}".encode()).hexdigest()


def fingerprint(directory: Path, files: Inputs) -> str:
    """Return the SHA-256 over an adapter's config and weights, as a hexadecimal string.

    Raises:
        EmlocError: the adapter was written by EMLoC and has changed since.
    """
    if manifest := read_manifest(directory):
        require_unchanged(manifest, directory, content_hash(directory))
    return files.hash([directory / CONFIG, directory / WEIGHTS])


def write_adapter(
    directory: Path,
    config: Mapping[str, Any],
    loras: Mapping[str, Lora],
    metadata: Mapping[str, str] | None = None,
    others: Mapping[str, torch.Tensor] = _NONE,
) -> None:
    """Write LoRAs by module path as a PEFT adapter: plain ``PeftModel.from_pretrained`` loads it.

    ``others`` are tensors that belong to no LoRA, by their keys without PEFT's prefix.
    """
    write_json(directory / CONFIG, dict(config))
    tensors = {f"{_PREFIX}{key}": tensor for key, tensor in others.items()}
    for path, lora in sorted(loras.items()):
        prefix, (a, b) = (in_file(path), flattened(lora)) if lora.is_stacked else (path, (lora.a, lora.b))
        tensors[f"{_PREFIX}{prefix}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{prefix}.lora_B.weight"] = b
    write_shard(directory / WEIGHTS, tensors, metadata)
