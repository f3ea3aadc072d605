"""The zoo's state: the store, the lock, and the timing of jobs."""
