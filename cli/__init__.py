"""The command line ``els``."""
