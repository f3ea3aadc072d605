"""The conditions under which checks are run. Light to import."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from emloc_core.family import Family
from emloc_core.plugins.manager import plugin_manager


@contextmanager
def under_test(family: Family) -> Iterator[None]:
    """Make the stages use a declaration, installed or not, without output and on one thread.

    Tiny tensors gain nothing from threads: with two, the kit takes six times as much processor time.
    """
    import torch
    from transformers import logging

    level, bars, threads = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), plugin_manager().declaring(family):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
