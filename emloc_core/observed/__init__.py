"""Declares a model that no plugin declares, by looking at a tiny model of its config."""
