"""Lets diffusers load emulators without importing EMLoC, as :mod:`emloc_core.compat.autoload` does for transformers."""

from emloc_core.compat.autoload import register_with


def watch() -> None:
    """Register emulators with diffusers as soon as its quantizers are imported."""
    register_with("diffusers", "diffusers.models.modeling_utils", "emloc_diffusers.quantizer")
