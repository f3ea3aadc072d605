"""Drafts the declaration of an unknown architecture from its config and one forward of a tiny model."""
