"""Parts of other libraries that EMLoC overrides or reads though nothing promises them, a module per library.

Each part says why it is needed. ``tests/compat`` has a contract for each: if a library has changed, it fails with a
sentence that says what changed, and what depends on it. The rest of EMLoC uses only public parts, and this package.
"""
