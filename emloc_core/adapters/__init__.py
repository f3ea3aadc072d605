"""Stage 3: a LoRA that is read, corrected for the base, and merged into it."""
