"""Tables and figures, and results in words."""
