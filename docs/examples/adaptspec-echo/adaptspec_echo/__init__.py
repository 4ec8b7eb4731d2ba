"""The plugin: light, so that its hook imports torch only when called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptspec import hookimpl

if TYPE_CHECKING:
    from adaptspec.strategy import Strategy


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    """Drafts that the last tokens repeat."""
    from adaptspec_echo.strategy import Echo

    return [Echo]
