"""The process of the ``emloc`` command; ``python -m emloc_core`` is for launchers such as ``accelerate launch``."""

from emloc_core.cli import main
from emloc_core.processes.lifetime import leave


def run() -> None:
    """Run the command line, and end the process."""
    try:
        main()
    except SystemExit as end:
        leave(int(end.code or 0))
    leave(0)


if __name__ == "__main__":
    run()
