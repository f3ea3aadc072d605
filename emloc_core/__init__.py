"""EMLoC: fine-tune a large model in the memory that inference needs.

Importing this package imports nothing heavy: the command line starts through it. To load an emulator with plain
``transformers``, ``import emloc_core.lowrank`` first.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("emloc")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
