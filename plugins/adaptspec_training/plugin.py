"""The trainer's plugin: light, adds the ``train`` command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptspec.hookspecs import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def register_commands(cli: click.Group) -> None:
    """``adaptspec train``, a group with one command per kind of drafter."""
    from adaptspec_training.commands import train

    cli.add_command(train)
