"""The error for models that this export does not support, but llama.cpp's own converter may."""

from emloc_core.errors import EmlocError


def unsupported(what: str) -> EmlocError:
    """Return the error for something that a GGUF file of ours cannot hold."""
    return EmlocError(what, "Convert the merged model with llama.cpp's own convert_hf_to_gguf.py.", code="unsupported")
