"""Drafting the declaration of a new family."""
