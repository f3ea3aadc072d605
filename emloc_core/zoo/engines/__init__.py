"""Engines: where jobs run, on this machine or on the nodes of a cluster."""
