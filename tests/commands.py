"""The command line, called in this process."""

from typer.testing import CliRunner, Result

from els.cli import app as cli


def els(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
