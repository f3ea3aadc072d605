"""Adapters and models in the form that servers expect."""
