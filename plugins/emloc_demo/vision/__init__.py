"""The command ``emloc demo-vision``: a model that sees, trained here from scratch and adapted by the whole method."""
