"""The plugin: opens the store, adds ``adaptspec profiles``. Light on import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptspec.hookspecs import hookimpl

if TYPE_CHECKING:
    import click

    from adaptspec.profile import ProfileStore


@hookimpl
def open_profile_store(url: str | None) -> ProfileStore:
    """Open the database at ``url``."""
    from adaptspec_profiles import open_store

    return open_store(url)


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``profiles``."""
    from adaptspec_profiles.commands import profiles

    cli.add_command(profiles)
