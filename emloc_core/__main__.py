"""The process of the ``emloc`` command; ``python -m emloc_core`` is for launchers such as ``accelerate launch``."""

from emloc_core.processes.lifetime import run_to_end


def run() -> None:
    """Run the command line, and end the process."""
    run_to_end(_main)


def _main() -> None:
    from emloc_core.cli import main

    main()


if __name__ == "__main__":
    run()
