"""The command line ``els``."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; the console entry point ``els``.

    What it needs is imported here, so that an interruption of the imports is reported like any
    other.
    """
    try:
        from els.cli.app import main as run

        run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
