"""The command ``emloc demo-vision``: a small vision model, trained here from scratch and tuned by the whole method."""
