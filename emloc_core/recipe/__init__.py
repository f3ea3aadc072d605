"""Runs all stages from one file."""
