"""The files of a LoRA directory, as PEFT names them."""

from pathlib import Path

from emloc_core.errors import EmlocError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def require_lora(directory: Path) -> None:
    """Refuse a directory that holds no LoRA."""
    if not directory.is_dir():
        raise EmlocError(f"There is no directory {directory}.", "Check the path of the adapter.", code="missing")
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        raise EmlocError(
            f"{directory} is not a LoRA directory: it needs {CONFIG} and {WEIGHTS}.",
            "Give the directory that training wrote.",
            code="missing",
        )
