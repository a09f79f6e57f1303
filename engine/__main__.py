"""``python -m els.engine`` is the command line ``els``."""

from els.engine.cli import main

main()
