"""A model whose weights come and go while it runs."""
