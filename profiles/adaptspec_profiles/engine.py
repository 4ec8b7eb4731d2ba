"""Database engines: explicit transactions, so that a failed step leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from adaptspec.errors import ProfileStoreError

BUSY_SECONDS = 60


def sqlalchemy_url(url: str) -> str:
    """``url`` itself, or the SQLite URL of a path."""
    if "://" in url:
        return url
    return f"sqlite:///{Path(url).expanduser().absolute()}"


def make_engine(url: str) -> Engine:
    """An engine for a path or SQLAlchemy URL.

    SQLite begins every transaction with ``BEGIN IMMEDIATE``: with pysqlite's own
    transactions a migration that fails halfway would keep its first tables.

    Raises:
        ProfileStoreError: if the URL can't be used.
    """
    try:
        parsed = make_url(sqlalchemy_url(url))
        if parsed.get_backend_name() != "sqlite":
            return create_engine(parsed, pool_pre_ping=True)
        if parsed.database and parsed.database != ":memory:":
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
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


def safe_url(url: str) -> str:
    """``url`` with its password hidden."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url
