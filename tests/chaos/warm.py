"""Imports what the commands import, so that a fork of this process starts at once. Nothing is computed here.

A fork of a process in which torch has computed would wait forever for threads that it does not have.
"""

import gc
from importlib import import_module

from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM  # noqa: F401 - transformers imports when asked
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from emloc_core.plugins.manager import plugin_manager

plugin_manager().commands()
for stage in (
    "adapters.correct",
    "adapters.merge",
    "emulator.compress",
    "emulator.cut",
    "evaluation.evaluate",
    "memory.show",
    "model.importing",
    "tuning.exact",
):
    import_module(f"emloc_core.{stage}")
get_checkpoint_conversion_mapping("llama")  # half of the time of a short stage
gc.freeze()  # a collection in a fork would copy all these pages
