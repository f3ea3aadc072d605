"""``python -m emloc_core`` is the ``emloc`` command, for launchers such as ``accelerate launch -m emloc_core``."""

from emloc_core.cli import main

if __name__ == "__main__":
    main()
