"""Loading plugins, isolating broken ones, and tracing hook calls."""
