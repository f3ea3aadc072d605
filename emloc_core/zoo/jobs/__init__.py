"""What is done: jobs, from what a user names to what became of them."""
