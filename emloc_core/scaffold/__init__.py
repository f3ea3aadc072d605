"""Drafts the declaration of a new family."""
