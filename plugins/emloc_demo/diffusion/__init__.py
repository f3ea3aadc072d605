"""Pictures, out: a small FLUX, trained here on handwritten digits, learns a style."""
