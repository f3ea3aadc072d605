"""Where it is done: workers on this machine or on the nodes of a cluster."""
