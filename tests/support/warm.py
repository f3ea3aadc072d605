"""Imports what the commands import, so that a fork of this process starts at once. Nothing is computed here.

A fork of a process in which torch has computed would wait forever for threads that it does not have.
"""

import gc
from importlib import import_module

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from emloc_core.plugins.manager import plugin_manager

plugin_manager().commands()
for name in (
    "emloc_core.adapters.correct",
    "emloc_core.adapters.merge",
    "emloc_core.emulator.compress",
    "emloc_core.evaluation.evaluate",
    "emloc_core.memory.plan",
    "emloc_core.model.importing",
    "emloc_core.tuning.exact",
    "emloc_core.zoo.convert",
    "peft",
    "pytest",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
):
    import_module(name)
get_checkpoint_conversion_mapping("llama")  # half of the time of a short stage
gc.freeze()  # a collection in a fork would copy all these pages
