"""Lets diffusers load emulators without an import of ours, as :mod:`emloc_core.compat.autoload` lets transformers."""

from emloc_core.compat.autoload import register_with


def watch() -> None:
    """Register emulators with diffusers as soon as its quantizers are imported."""
    register_with("diffusers", "diffusers.models.modeling_utils", "emloc_diffusers.quantizer")
