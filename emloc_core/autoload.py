"""Lets transformers load emulators without an import of ours, and other imports take less time.

torch has an entry point for extensions, ``torch.backends``.

torch calls :func:`watch` when it has been imported, long before a model is loaded. Importing transformers then
would cost every program that uses torch a second, so its import is watched for. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``
switches all such entry points off.
"""

from importlib import import_module

from emloc_core.compat.imports import is_being_imported, when_imported
from emloc_core.compat.lighter import lighten

#: When this package has been imported, emulators can be registered with it.
_WATCHED = "transformers.quantizers"
#: It imports that, and is imported before any model is loaded.
_IMPORTER = "transformers.modeling_utils"


def watch() -> None:
    """Register emulators with transformers as soon as its quantizers are imported, and lighten other imports."""
    when_imported(_IMPORTER if is_being_imported(_WATCHED) else _WATCHED, _register)
    lighten()


def _register() -> None:
    import_module("emloc_core.standins.quantizer")
