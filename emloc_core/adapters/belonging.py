"""Checks that adapter, emulator and base belong together."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.dense import require_dense
from emloc_core.adapters.emulator import Emulator
from emloc_core.algorithms.lora import Lora
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint, open_checkpoint
from emloc_core.files.inputs import Inputs
from emloc_core.files.manifest import manifest_value, read_manifest
from emloc_core.standins.experts import matrices
from emloc_core.standins.format import kind_of


def require_shapes(adapter: Adapter, model: nn.Module) -> None:
    """Refuse an adapter with a LoRA that fits no Linear of the model, which may be on the meta device."""
    for path, lora in adapter.loras.items():
        try:
            actual = _shape(model, path, lora)
        except AttributeError:
            raise EmlocError(
                f"The base has no Linear at {path}.",
                "The adapter belongs to another architecture: give the base that it was trained for.",
                code="mismatch",
            ) from None
        if actual != lora.shape:
            raise EmlocError(
                f"The LoRA on {path} is for a weight of shape {lora.shape}; the base has {actual}.",
                "The adapter belongs to another model: give the base that it was trained for.",
                code="mismatch",
            )
    require_dense(adapter.replaced, model)


def _shape(model: nn.Module, path: str, lora: Lora) -> tuple[int, ...]:
    """Return the shape of the weight that a LoRA at this path is for: (m, n), or (E, m, n) of a stack."""
    if lora.is_stacked:
        owner, _, name = path.rpartition(".")
        return tuple(matrices(model.get_submodule(owner), name).shape)
    module: Any = model.get_submodule(path)
    if isinstance(module, nn.Linear):  # its weight may be packed
        return module.out_features, module.in_features
    return tuple(module.weight.shape)


def require_base(adapter: Adapter, base: Checkpoint, files: Inputs, *, allow_uncorrected: bool = False) -> str:
    """Return the fingerprint of the base of an adapter.

    Args:
        adapter: for the base, not for an emulator of it.
        allow_uncorrected: accept an adapter that was, or may have been, trained on an emulator of it.

    Raises:
        EmlocError: manifests, or the config, name another base; the adapter is not corrected; or it is unknown whether
            it is.
    """
    fingerprint, request = base.fingerprint(files), adapter.manifest.get("request", {})
    made_for = request.get("base") or request.get("model")
    if not adapter.is_corrected:
        model = adapter.trained_on
        emulator = read_manifest(model) if model else None
        if emulator is not None and emulator.get("kind") == "emulator":
            made_for = manifest_value(emulator, adapter.trained_on or Path(), "request.base", str)
            if not allow_uncorrected:
                raise EmlocError(
                    f"{adapter.directory} was trained on an emulator and is not corrected.",
                    "Run `emloc correct` first, or use it uncorrected with --allow-uncorrected.",
                    code="mismatch",
                )
        if is_on_rounded(adapter, base):
            return fingerprint
        model_name = adapter.config.get("base_model_name_or_path") or "a model that it does not name"
        if not model and made_for and made_for != fingerprint and model_name != base.name:
            raise EmlocError(
                f"{adapter.directory} was trained on {model_name}, which was not found, and not on {base.directory}.",
                "If that is an emulator of it, put it back, or correct the adapter with `emloc correct --emulator`.",
                code="missing",
            )
        if model and not made_for and not allow_uncorrected and _is_another(model, fingerprint, files):
            raise EmlocError(
                f"{adapter.directory} was trained on {model}, and {base.directory} is another model.",
                "Give that one, or --allow-uncorrected if this is the same in another form.",
                code="mismatch",
            )
        if not model and not made_for and model_name != base.name and not allow_uncorrected:
            raise EmlocError(
                f"{adapter.directory} was trained on {model_name}, which was not found, so it is unknown whether that "
                "is an emulator.",
                "If it was trained on the base itself, give --allow-uncorrected.",
                code="missing",
            )
    if made_for and made_for != fingerprint:
        raise EmlocError(
            f"{adapter.directory} was made for a base other than {base.directory}: the fingerprints differ.",
            "Give the base that the adapter was made for, unchanged.",
            code="mismatch",
        )
    return fingerprint


def _is_another(model: Path, fingerprint: str, files: Inputs) -> bool:
    """Return whether a model is known to have another fingerprint; False for one that cannot be read."""
    try:
        return Checkpoint(model).fingerprint(files) != fingerprint
    except EmlocError:
        return False


def is_for_another(adapter: Adapter, model: Checkpoint) -> bool:
    """Return whether an adapter is plainly for another model: its base is there and has other weights.

    Only the first rows of matrices are compared, and none of a quantised model or an emulator.
    """
    try:
        base = open_checkpoint(adapter.base_name, cached=True)
        ours, theirs = base.tensors, model.tensors
    except EmlocError:  # it has moved, or cannot be read
        return False
    if model.config.get("quantization_config"):
        return False
    forms = {key: (tensor.shape, tensor.dtype) for key, tensor in theirs.items() if len(tensor.shape) in (1, 2)}
    shared = [key for key, tensor in ours.items() if forms.get(key) == (tensor.shape, tensor.dtype)]
    with base.slices(shared) as first, model.slices(shared) as second:
        return any(not torch.equal(first[key][:1], second[key][:1]) for key in shared)


def is_on_rounded(adapter: Adapter, base: Checkpoint) -> bool:
    """Return whether an adapter was trained on a quantised form of its base, as in QLoRA: it is for the base as well.

    That is a checkpoint such as bitsandbytes', and no emulator: its vectors (norms, biases) are not quantised,
    so they are the base's but for their dtype.
    """
    try:
        model = open_checkpoint(adapter.model_name, cached=True)
    except EmlocError:  # neither in a directory, nor in the cache of the hub
        return False
    if not model.config.get("quantization_config") or base.config.get("quantization_config") or kind_of(model.config):
        return False
    vectors = [key for key, tensor in base.tensors.items() if len(tensor.shape) == 1 and tensor.is_floating_point]
    if not vectors or any(key not in model.tensors for key in vectors):
        return False
    with model.slices(vectors) as ours, base.slices(vectors) as theirs:
        pairs = [(ours[key][...].float(), theirs[key][...].float()) for key in vectors]
    return all(ours.shape == theirs.shape and torch.allclose(ours, theirs, 1e-2, 1e-3) for ours, theirs in pairs)


def require_match(
    adapter: Adapter, emulator: Emulator, emulator_fingerprint: str, base: Checkpoint, base_fingerprint: str
) -> None:
    """Refuse an adapter, emulator and base that do not belong together by the fingerprints in their manifests."""
    trained_on = adapter.manifest.get("request", {}).get("model")
    if trained_on is not None and trained_on != emulator_fingerprint:
        raise EmlocError(
            f"{adapter.directory} was trained on an emulator other than {emulator.directory}: the fingerprints differ.",
            "Give the emulator that it was trained on, unchanged, with --emulator.",
            code="mismatch",
        )
    if emulator.entry("request.base", str) != base_fingerprint:
        raise EmlocError(
            f"The emulator {emulator.directory} was made from a base other than {base.directory}: the fingerprints "
            "differ.",
            "Give the base that the emulator was made from, unchanged, with --base.",
            code="mismatch",
        )
