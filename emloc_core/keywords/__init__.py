"""The keywords that Python's functions take, for editors and type checkers."""
