"""Parts of other libraries that EMLoC overrides or reads though nothing promises them, a module per library.

Each part says why it is needed. ``tests/compat`` has a contract for each: it fails where a library has changed, with a
sentence that says what, and what depends on it. The rest of EMLoC uses what is public, and this package.
"""
