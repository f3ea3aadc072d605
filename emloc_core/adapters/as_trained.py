"""Stage 3 where there is nothing to correct: a LoRA that was trained on its base, or on the base in four bits."""

from functools import cached_property
from pathlib import Path
from typing import Any

from emloc_core.adapters.adapter import CORRECTED, Adapter, content_hash, write_adapter
from emloc_core.adapters.belonging import require_base
from emloc_core.adapters.moments import copy_moments, hash_moments
from emloc_core.errors import EmlocError
from emloc_core.files.inputs import Inputs
from emloc_core.files.job import Job, Progress
from emloc_core.files.manifest import CONTENT
from emloc_core.files.output import Output
from emloc_core.model.opened import open_model
from emloc_core.requests import CorrectRequest
from emloc_core.standins.format import kind_of


class AsTrained(Job):
    """Copies an adapter that was trained on no emulator, so that later stages find it where they expect it.

    Raises:
        EmlocError: the model that it was trained on, or that model's original, has no family, or is an emulator.
    """

    def __init__(self, request: CorrectRequest, adapter: Adapter) -> None:
        self.adapter, self._path = adapter, request.output
        self.model = open_model(request.base or adapter.model_name, "cpu")
        self.base = self.model.checkpoint
        if kind_of(self.base.config):  # an emulator on the hub
            raise EmlocError(
                f"{adapter.directory} was trained on {self.base.name}, which is an emulator.",
                "Give its directory with --emulator.",
                code="mismatch",
            )

    @property
    def warnings(self) -> list[str]:
        """What the user has to know: that nothing is corrected."""
        return [
            f"{self.adapter.directory} was trained on {self.adapter.model_name}, which is not an emulator: the LoRA "
            "stays as it is"
        ]

    @cached_property
    def output(self) -> Output:
        """The copy's directory.

        Raises:
            EmlocError: the adapter does not belong to the base.
        """
        files = Inputs(self._path.resolve().parent)
        fingerprint = require_base(self.adapter, self.base, files)
        moments = hash_moments(self.adapter.directory, files)
        request = {"adapter": self.adapter.fingerprint(files), **moments, "base": fingerprint}
        inputs = {"adapter": str(self.adapter.directory.absolute()), "base": self.base.name}
        return Output(self._path, "corrected-adapter", request, inputs=inputs, files=files, family=self.model.family)

    def describe(self) -> dict[str, Any]:
        """Return what would be done."""
        return {
            "output": str(self._path),
            "linears": len(self.adapter.loras),
            "clamp": 0,
            "selection_rows": 0,
            "base_bytes_read": 0,
            "finished": self.output.is_finished(),
        }

    def make(self, staging: Path, progress: Progress) -> None:
        """Copy it."""
        config = {**self.adapter.config, "base_model_name_or_path": self.base.name}
        write_adapter(staging, config, self.adapter.loras, {CORRECTED: "0"}, self.adapter.others)
        copy_moments(self.adapter.directory, staging)
        self.model.objective.accompany(self.base, staging)
        self.output.result = {
            "clamp": 0, "scale": 1.0, "linears": len(self.adapter.loras), CONTENT: content_hash(staging)
        }  # fmt: skip
        self.output.provenance = "Left as it was: not trained on an emulator."
        progress("copied", 1, 1)
