"""Memory of each stage, computed from the config alone."""
