"""Bytes on disk: whole or absent, streamed, fingerprinted."""
