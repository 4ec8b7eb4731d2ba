"""Profiles and trials kept in SQLite, or any database SQLAlchemy speaks to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptspec.profile import ProfileStore


def default_url() -> str:
    """``ADAPTSPEC_DB``, else a file in the user's data folder."""
    import os

    from platformdirs import user_data_path

    return os.environ.get("ADAPTSPEC_DB") or str(
        user_data_path("adaptspec") / "profiles.db"
    )


def open_store(url: str | None = None) -> ProfileStore:
    """Open, and create or migrate, the database at ``url``.

    Args:
        url: A file path, a SQLAlchemy URL, or ``memory:``; None: :func:`default_url`.

    Raises:
        ProfileStoreError: if it can't be opened or is newer than this code.
    """
    from adaptspec_profiles.memory import MemoryStore
    from adaptspec_profiles.sql import SqlStore

    wanted = url if url is not None else default_url()
    return MemoryStore() if wanted == "memory:" else SqlStore(wanted)
