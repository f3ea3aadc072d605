"""Known models, their published sizes, and what fits."""
