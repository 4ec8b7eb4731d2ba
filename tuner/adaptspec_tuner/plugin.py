"""The tuner's plugin: light, adds the ``tune`` and ``report`` commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptspec.hookspecs import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def register_commands(cli: click.Group) -> None:
    """``adaptspec tune`` and ``adaptspec report``."""
    from adaptspec_tuner.commands import report, tune

    cli.add_command(tune)
    cli.add_command(report)
