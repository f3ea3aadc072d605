"""Writes an adapter in the form that servers agree on, and an adapter or a model as GGUF."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from emloc_core.adapters.adapter import CORRECTED, Adapter, content_hash, write_adapter
from emloc_core.adapters.belonging import require_base, require_shapes
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint, open_checkpoint
from emloc_core.files.inputs import Inputs
from emloc_core.files.lora import CONFIG
from emloc_core.files.manifest import CONTENT
from emloc_core.files.output import Output
from emloc_core.model.skeleton import Skeleton
from emloc_core.plugins.manager import plugin_manager
from emloc_core.requests import ExportRequest
from emloc_core.serving.gguf_files import require_gguf, write_lora, write_model
from emloc_core.serving.plain import plain, plain_config, warnings
from emloc_core.settings import ExportSettings


class Export:
    """An export, after the cheap checks; :meth:`run` writes it.

    Args:
        base: the model, or the model that the adapter is for.
        adapter: None to export the model itself.
        output: directory of the export.
        settings: its format.
        allow_uncorrected: export an adapter that was trained on an emulator without correcting it.

    Raises:
        EmlocError: the adapter does not fit the base, or they cannot be written in this format.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: Adapter | None,
        output: Path,
        settings: ExportSettings,
        *,
        allow_uncorrected: bool = False,
    ) -> None:
        self.base, self.adapter, self.settings = base, adapter, settings
        self._path, self._allow_uncorrected = output, allow_uncorrected
        base.require_unquantised("--base" if adapter else "")
        self.family = plugin_manager().family_for(base.config)
        if settings.gguf:
            require_gguf(self.family, base.config)
        elif adapter is None:
            raise EmlocError(
                f"{base.directory} is a model, which servers take as it is.",
                "Serve it as it is, or write GGUF with --gguf.",
            )
        if adapter is not None:
            self.model = Skeleton(base, self.family).model
            require_shapes(adapter, self.model)
            if adapter.replaced:
                raise EmlocError(
                    f"{adapter.directory} replaces {', '.join(adapter.replaced)}, which servers take in no adapter.",
                    "Merge it, and serve the merged model.",
                    code="unsupported",
                )
            self.loras = plain(adapter.loras)

    @cached_property
    def output(self) -> Output:
        """The directory. The files of the inputs are hashed on first access.

        Raises:
            EmlocError: the adapter does not belong to the base.
        """
        files = Inputs(self._path.resolve().parent)
        fingerprint = self.base.fingerprint(files)
        request = {"base": fingerprint, **self.settings.model_dump()}
        inputs = {"base": self.base.name}
        if self.adapter is not None:
            require_base(self.adapter, self.base, fingerprint, allow_uncorrected=self._allow_uncorrected)
            request["adapter"] = self.adapter.fingerprint(files)
            inputs["adapter"] = str(self.adapter.directory.absolute())
        kind = "gguf" if self.settings.gguf else "served-adapter"
        return Output(self._path, kind, request, inputs=inputs, files=files, family=self.family)

    def describe(self) -> dict[str, Any]:
        """Return what would be written."""
        found: dict[str, Any] = {"output": str(self._path), **self.settings.model_dump()}
        if self.adapter is not None:
            found |= {"linears": len(self.loras), "warnings": list(warnings(self.loras, self.family))}
        return {**found, "finished": self.output.is_finished()}

    def run(self, _progress: Callable[[str, int, int], None] = lambda *_: None) -> Path:
        """Write the export; an interrupted one starts again."""
        if self.output.is_finished():
            return self.output.path
        with self.output.build() as staging:
            result: dict[str, Any] = {}
            if self.adapter is not None:
                result = {"linears": len(self.loras), "rank": next(iter(self.loras.values())).a.shape[0]}
                result["warnings"] = list(warnings(self.loras, self.family))
            if not self.settings.gguf:
                config = plain_config(self.loras, self.base.name, (path for path, _ in self.model.named_modules()))
                write_adapter(staging, config, self.loras, {CORRECTED: "exported"})
                self.base.copy_processing(staging)
                result[CONTENT] = content_hash(staging)
            elif self.adapter is not None:
                file = staging / "adapter.gguf"
                result["tensors"] = write_lora(self.loras, self.base, self.family, file, self.settings.dtype)
            else:
                file = staging / "model.gguf"
                result["tensors"] = write_model(self.base, self.family, file, self.settings.dtype)
            self.output.result = result
        return self.output.path


def prepare(request: ExportRequest) -> Export:
    """Return the job of a request.

    Raises:
        EmlocError: the adapter or the model cannot be used.
    """
    adapter = Adapter(request.source) if (Path(request.source) / CONFIG).is_file() else None
    if not adapter and (request.base or request.allow_uncorrected):
        raise EmlocError(f"{request.source} is a model, not an adapter.", "Leave out --base and --allow-uncorrected.")
    base = open_checkpoint((request.base or adapter.base_name) if adapter else request.source)
    return Export(base, adapter, request.output, request.settings, allow_uncorrected=request.allow_uncorrected)
