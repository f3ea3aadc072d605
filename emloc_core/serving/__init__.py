"""Adapters and models as servers take them."""
