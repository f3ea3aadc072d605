"""From a request to the finished output of its stage."""
