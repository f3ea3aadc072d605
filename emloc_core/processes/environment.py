"""Sets the environment variables that libraries below torch read once, and silences useless messages of others."""

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Threads of OpenMP that spin while they wait for work starve a second core: 20 s against 5 s under load. A short spin
#: first: without it an eigendecomposition took twice as long on two idle cores (0.61 s, not 0.30 s).
#: oneDNN caches primitives for products of up to a thousand shapes. Where ranks differ, they took 0.1 GB per block
#: of a 1B model in stage 1, and 0.8 GB of 3.8 in tuning SmolLM2-135M; with 64 shapes, steps take as long. Between torch
#: and oneDNN, ideep keeps as many again: with rows of 40 lengths, tuning SmolLM2-135M took 1.09 GB and not the planned
#: 0.87; with 64 it takes 0.86, and 9 % more time where a step is short.
VARIABLES = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "10000",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
    "TOKENIZERS_PARALLELISM": "false",
}

#: Libraries that log to stderr.
LOGGERS = ("transformers", "datasets", "huggingface_hub", "trl", "peft", "accelerate", "torch", "bitsandbytes")

logging.getLogger("emloc").addHandler(logging.NullHandler())  # a program that embeds EMLoC decides what is shown


def settle() -> None:
    """Set the variables that the user has not set. Call it before torch computes."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)


@contextmanager
def without_collections() -> Iterator[None]:
    """Have Python look for no cycles among objects that stay (modules, rows): it would take a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def hush_libraries() -> None:
    """Silence what libraries say that users cannot act on."""
    # PEFT and TRL use old names in transformers.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    # On some processors it asks for a package that fetches compiled code.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from writing to stdout and stderr: bars are off, warnings go to the logger ``emloc.warnings``."""
    from datasets.utils import logging as datasets_logging
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    bars = (
        (transformers_logging.is_progress_bar_enabled(), transformers_logging),
        (datasets_logging.is_progress_bar_enabled(), datasets_logging),
    )
    hub_bars = not hub.are_progress_bars_disabled()
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    last_resort, logging.lastResort = logging.lastResort, logging.NullHandler()  # of a program that set up no logging
    hub.disable_progress_bars()
    for _, library in bars:
        library.disable_progress_bar()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _log_warning
            yield
    finally:
        logging.lastResort = last_resort
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for was_on, library in bars:
            if was_on:
                library.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    logging.getLogger("emloc.warnings").warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)
