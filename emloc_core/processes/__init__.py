"""Processes: their environment, their lifetime, and functions that are called in one of their own."""
