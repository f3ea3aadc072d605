"""The command ``emloc demo-full``: every way to tune SmolLM2 that EMLoC has, and ordinary LoRAs, side by side."""
