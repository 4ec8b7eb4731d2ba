"""Database engines: explicit transactions, so that a failed step leaves nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from adaptspec.errors import ProfileStoreError

BUSY_SECONDS = 60
MEMORY = ":memory:"


def parsed_url(url: str) -> URL:
    """``url`` itself, or the SQLite URL of a path, whatever characters it has."""
    if "://" in url:
        return make_url(url)
    path = url if url == MEMORY else str(Path(url).expanduser().absolute())
    return URL.create("sqlite", database=path)


def make_engine(url: str) -> Engine:
    """An engine for a path or SQLAlchemy URL.

    SQLite begins every transaction with ``BEGIN IMMEDIATE``: with pysqlite's own
    transactions a migration that fails halfway would keep its first tables.

    Raises:
        ProfileStoreError: if the URL can't be used.
    """
    try:
        parsed = parsed_url(url)
        if parsed.get_backend_name() != "sqlite":
            return create_engine(parsed, pool_pre_ping=True)
        if parsed.database and parsed.database != MEMORY:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
    except ValueError:
        # Its text would be the piece that isn't a port: perhaps of a password.
        raise ProfileStoreError(
            f"can't use the profile database {safe_url(url)}: it can't be parsed; "
            "is its port a number? (--db takes a file path or a SQLAlchemy URL)"
        ) from None
    except (ArgumentError, ModuleNotFoundError, OSError, SQLAlchemyError) as error:
        raise ProfileStoreError(
            f"can't use the profile database {safe_url(url)}: {error} "
            "(--db takes a file path or a SQLAlchemy URL)"
        ) from error

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def beside(url: URL) -> Path | None:
    """The folder for files that belong to the database at ``url``."""
    if url.get_backend_name() != "sqlite":
        from platformdirs import user_data_path

        return user_data_path("adaptspec")
    if not url.database or url.database == MEMORY:
        return None
    return Path(url.database).absolute().parent


def safe_url(url: str) -> str:
    """What may be printed of ``url``: neither password nor query, which may hold one.

    Cut by hand, so that it holds for a URL that can't be parsed as well.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        return f"sqlite:///{parsed_url(url).database}"
    login, at, place = rest.rpartition("@")
    user = re.split(r"[:/?#]", login)[0]
    return f"{scheme}://{user}{at}{place.partition('?')[0]}"
