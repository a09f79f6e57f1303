"""The command line ``els``.

Results go to stdout; progress and errors to stderr. An expected failure is one message without a
traceback and exit code 1; wrong usage is 2, Ctrl-C 130.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Annotated

import typer

from els.cli import benchmark, databases, doctor, explaining, sampling
from els.cli.console import prepare_streams

app = typer.Typer(
    name="els",
    help="Equivariant local score machines: images from training patches, with no training.",
    epilog="A first run: els build embedded:fashion-mnist -o db, then "
    "els sample db --sizes fashion-mnist-resnet -o run, then els explain run --sample 0",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for group in (databases, sampling, benchmark, explaining, doctor):
    app.registered_commands += group.commands.registered_commands


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from els.storage.manifests import package_version

        typer.echo(f"els-machine {package_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Options of ``els`` itself; the help text is that of the app."""


def main() -> None:
    """Run the command line, all of which is imported."""
    prepare_streams()
    command_line()()


@cache
def command_line() -> typer.Typer:
    """The app, with the commands that other packages add to it.

    An entry point of the group ``els.commands`` is a function that takes the app and registers
    commands on it; its module imports the needs of its commands within them. If one is broken, only
    its own commands are missing.
    """
    for point in sorted(metadata.entry_points(group="els.commands"), key=lambda point: point.name):
        try:
            register = point.load()
        except (ImportError, AttributeError) as error:
            typer.echo(f"warning: the commands of {point.value} are left out: {error}", err=True)
            continue
        register(app)
    return app
