"""Stage 1: the emulator, from ranks to files."""
