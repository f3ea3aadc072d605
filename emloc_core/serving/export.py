"""Writes an adapter in the form that servers agree on, and an adapter or a model as GGUF."""

from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from emloc_core.adapters.adapter import CORRECTED, Adapter, content_hash, write_adapter
from emloc_core.adapters.belonging import require_base, require_shapes
from emloc_core.data.chat_template import untuned_start
from emloc_core.data.tokenize import load_tokenizer
from emloc_core.errors import EmlocError
from emloc_core.files.inputs import Inputs
from emloc_core.files.job import Job, Progress
from emloc_core.files.lora import CONFIG
from emloc_core.files.manifest import CONTENT
from emloc_core.files.output import Output
from emloc_core.model.opened import open_original
from emloc_core.requests import ExportRequest
from emloc_core.serving.gguf_files import GgufFile, lora_file, model_file
from emloc_core.serving.plain import plain, plain_config, warnings

#: Warning about a chat template that begins answers with text that tuning never shows.
_STARTS = (
    "The model's chat template begins every answer with {!r}, which tuning does not show: serve it with a template "
    "that leaves this out, as `emloc chat` and `eval` do."
)


class Export(Job):
    """An export, after the cheap checks; :meth:`run` writes it.

    Args:
        request: which adapter or model is written, and in which format.

    Attributes:
        adapter: None if the model itself is exported.
        model: the model that is exported, or that the adapter is for.

    Raises:
        EmlocError: the adapter does not fit the model, or they cannot be written in this format.
    """

    def __init__(self, request: ExportRequest) -> None:
        self.request, self.settings = request, request.settings
        adapter = Adapter(Path(request.source)) if (Path(request.source) / CONFIG).is_file() else None
        if not adapter and (request.base or request.allow_uncorrected):
            raise EmlocError(
                f"{request.source} is a model, not an adapter.", "Leave out --base and --allow-uncorrected."
            )
        self.adapter = adapter
        if adapter:
            self.model = open_original(request.base or adapter.base_name, option="--base")
        else:
            self.model = open_original(request.source)
        self.base = self.model.checkpoint
        if self.settings.comfyui and (adapter is None or self.settings.gguf):
            raise EmlocError("--comfyui is for adapters, and does not write GGUF.", "Give an adapter, without --gguf.")
        if adapter is None and not self.settings.gguf:
            raise EmlocError(
                f"{self.base.directory} is a model, which servers load as it is.",
                "Serve it as it is, or write GGUF with --gguf.",
            )
        if adapter is not None:
            require_shapes(adapter, self.model.skeleton.model)
            if adapter.replaced:
                raise EmlocError(
                    f"{adapter.directory} replaces {', '.join(adapter.replaced)}, which no server accepts in an "
                    "adapter.",
                    "Merge it, and serve the merged model.",
                    code="unsupported",
                )
            self.loras = plain(adapter.loras)
        #: Made here, so that what the format does not express is refused at once.
        self.gguf: GgufFile | None = None
        if self.settings.gguf and adapter:
            dtype = self.settings.dtype if self.settings.dtype != "q8_0" else "f32"
            self.gguf = lora_file(self.loras, self.model, dtype)
        elif self.settings.gguf:
            self.gguf = model_file(self.model, self.settings.dtype)
        #: Tensors by the names that other tools use.
        self.renamed = self.model.objective.foreign_tensors(self.model, self.loras) if self.settings.comfyui else {}

    @cached_property
    def output(self) -> Output:
        """The output directory. The files of the inputs are hashed on first access.

        Raises:
            EmlocError: the adapter does not belong to the base.
        """
        files = Inputs(self.request.output.resolve().parent)
        request, inputs = {"base": self.base.fingerprint(files), **self.settings.model_dump()}, {"base": self.base.name}
        if self.adapter is not None:
            require_base(self.adapter, self.base, files, allow_uncorrected=self.request.allow_uncorrected)
            request["adapter"] = self.adapter.fingerprint(files)
            if emulator := self.adapter.manifest.get("request", {}).get("emulator"):
                request["emulator"] = emulator  # unlike a LoRA that was trained on the base
            inputs["adapter"] = str(self.adapter.directory.absolute())
        kind = "gguf" if self.settings.gguf else "comfyui" if self.settings.comfyui else "served-adapter"
        return Output(self.request.output, kind, request, inputs=inputs, files=files, family=self.model.family)

    def describe(self) -> dict[str, Any]:
        """Return what would be written."""
        content: dict[str, Any] = {"output": str(self.request.output), **self.settings.model_dump()}
        if self.adapter is not None:
            content |= {"linears": len(self.loras), "warnings": self._warnings()}
        return {**content, "finished": self.output.is_finished()}

    def _warnings(self) -> list[str]:
        start = ""
        with suppress(EmlocError):  # it has no tokenizer
            start = untuned_start(load_tokenizer(self.base.directory))
        # Only for servers such as vLLM: what the other formats cannot hold is refused.
        of_servers = [] if self.settings.gguf or self.settings.comfyui else warnings(self.loras, self.model.family)
        return [*of_servers, *([_STARTS.format(start)] if start else [])]

    def make(self, staging: Path, progress: Progress) -> None:
        """Write the export; ``progress`` is called with a tensor's name. An adapter for servers is one file."""
        result: dict[str, Any] = {}
        if self.adapter is not None:
            result = {"linears": len(self.loras), "rank": next(iter(self.loras.values())).rank}
            result["warnings"] = self._warnings()
        if self.settings.comfyui:
            save_file(self.renamed, staging / "lora.safetensors", {"format": "pt"})
            progress("adapter", 1, 1)
        elif self.gguf:
            result["tensors"] = self.gguf.write(staging / f"{'adapter' if self.adapter else 'model'}.gguf", progress)
        else:
            config = plain_config(
                self.loras, self.base.name, (path for path, _ in self.model.skeleton.model.named_modules())
            )
            write_adapter(staging, config, self.loras, {CORRECTED: "exported"})
            self.base.copy_processing(staging)
            result[CONTENT] = content_hash(staging)
            progress("adapter", 1, 1)
        self.output.result = result
        how = f"GGUF, matrices in {self.gguf.dtype}" if self.gguf else f"one rank, {result['rank']}, and a scale of 1"
        self.output.provenance = f"Export: {how}."
