"""Loading plugins, and isolating broken ones."""
