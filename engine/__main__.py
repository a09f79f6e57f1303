"""``python -m els.engine`` is the command line ``els``."""

from els.cli.app import main

main()
