"""``python -m els.engine`` is the command line ``els``."""

from els.cli import main

main()
