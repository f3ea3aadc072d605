"""What happened: the zoo's store, who may write it, and how long things took."""
