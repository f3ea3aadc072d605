"""Lets transformers load emulators without an import of ours, and other imports take less time.

torch has an entry point for extensions, ``torch.backends``. It calls :func:`watch` when it has been imported, long
before a model is loaded. Importing transformers then
would cost every program that uses torch a second, so its import is watched for. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``
switches all such entry points off.
"""

from functools import partial
from importlib import import_module

from emloc_core.compat.bitsandbytes import keeping_weights, unpacking_as_one_row
from emloc_core.compat.imports import is_being_imported, when_imported, while_imported
from emloc_core.compat.lighter import lighten


def watch() -> None:
    """Register emulators with transformers as soon as its quantizers are imported; fix and lighten other imports."""
    register_with("transformers", "transformers.modeling_utils", "emloc_core.standins.quantizer")
    while_imported("bitsandbytes._ops", unpacking_as_one_row)
    while_imported("bitsandbytes.nn.modules", keeping_weights)
    lighten()


def register_with(library: str, importer: str, module: str) -> None:
    """Import a module of ours, which registers emulators, as soon as the quantizers of a library have been imported.

    Args:
        library: a library with a package ``quantizers``.
        importer: module that imports that package, and is imported before any model is loaded.
        module: our module.
    """
    watched = f"{library}.quantizers"
    when_imported(importer if is_being_imported(watched) else watched, partial(import_module, module))
