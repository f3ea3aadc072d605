"""Imports what the commands import, so that a fork of this process starts at once. Nothing is computed here.

A fork of a process in which torch has computed would wait for ever for threads that it does not have.
"""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from emloc_core.plugins.manager import plugin_manager

plugin_manager().commands()
get_checkpoint_conversion_mapping("llama")  # half of the time of a short stage
gc.freeze()  # a collection in a fork would copy all these pages
