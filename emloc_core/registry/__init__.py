"""Known models, their published numbers, and what fits."""
