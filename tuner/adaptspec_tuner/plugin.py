"""The tuner's plugin: light, adds the ``tune``, ``report`` and ``compare`` commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptspec.hookspecs import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def register_commands(cli: click.Group) -> None:
    """``adaptspec tune``, ``adaptspec report`` and ``adaptspec compare``."""
    from adaptspec_tuner.commands import report, tune
    from adaptspec_tuner.engines.compare_command import compare

    cli.add_command(tune)
    cli.add_command(report)
    cli.add_command(compare)
