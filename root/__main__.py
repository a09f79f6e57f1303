"""``python -m els`` is the command line ``els``."""

from els.cli import main

main()
