"""Files on disk: complete or absent, streamed, fingerprinted."""
