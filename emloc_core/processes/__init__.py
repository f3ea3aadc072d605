"""Processes: environment, lifetime, functions called in one of their own, and several that train."""
