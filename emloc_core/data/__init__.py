"""The user's rows, up to what a model takes."""
