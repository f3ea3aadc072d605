"""Sets the environment variables that libraries below torch read once, and silences what others say for no one."""

import logging
import os
import warnings

#: Threads of OpenMP that spin while they wait for work starve a second core: 20 s against 5 s under load. A short spin
#: first: without it an eigendecomposition took twice as long on two idle cores (0.61 s, not 0.30 s).
#: oneDNN keeps what it made for products of up to a thousand shapes. Where ranks are unlike, that was 0.1 GB per block
#: of a 1B model in stage 1, and 0.8 GB of 3.8 in tuning SmolLM2-135M; with 64 shapes, steps take as long.
VARIABLES = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "10000",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "TOKENIZERS_PARALLELISM": "false",
}


def settle() -> None:
    """Set what the user has not set. Call it before torch computes."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)


def hush_libraries() -> None:
    """Silence what libraries say that users cannot act on."""
    # PEFT and TRL use old names in transformers.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    # On some processors it asks for a package that fetches compiled code.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
