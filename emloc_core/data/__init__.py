"""The user's rows, from files to model inputs."""
