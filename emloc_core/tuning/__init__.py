"""Stage 2: an ordinary LoRA, trained on the emulator."""
