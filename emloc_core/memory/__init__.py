"""What every stage needs, from the config alone."""
