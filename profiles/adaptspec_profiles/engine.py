"""Database engines: explicit transactions, so that a failed step leaves nothing."""

from __future__ import annotations

import re
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from adaptspec.errors import ProfileStoreError

BUSY_SECONDS = 60
LOG_AHEAD_SECONDS = 2
MEMORY = ":memory:"
READING = "adaptspec_reading"
POSTGRES = ("postgresql", "postgres")
POSTGRES_DRIVER = "postgresql+psycopg"

# Where hosts would each have a shared memory of their own for one write-ahead log.
NETWORK = (
    *("nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "pvfs"),
    *("gluster", "fuse.gluster", "fuse.sshfs", "fuse.ceph", "ocfs", "gfs", "webdav"),
)


def parsed_url(url: str) -> URL:
    """``url`` itself, or the SQLite URL of a path, whatever characters it has."""
    if "://" in url:
        parsed = make_url(url)
        if parsed.drivername in POSTGRES:
            # SQLAlchemy's own default differs between its versions.
            parsed = parsed.set(drivername=POSTGRES_DRIVER)
        return parsed
    path = url if url == MEMORY else str(Path(url).expanduser().absolute())
    return URL.create("sqlite", database=path)


def make_engine(url: str) -> Engine:
    """An engine for a path or SQLAlchemy URL.

    SQLite begins what may write with ``BEGIN IMMEDIATE``: with pysqlite's own
    transactions a migration that fails halfway would keep its first tables. Its files
    are switched to write-ahead logging, see :func:`_log_ahead`.

    Raises:
        ProfileStoreError: if the URL can't be used.
    """
    try:
        parsed = parsed_url(url)
        if parsed.get_backend_name() != "sqlite":
            return create_engine(parsed, pool_pre_ping=True)
        file = file_of(parsed)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        on_network = file is not None and on_network_file_system(file)
        engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
    except ValueError:
        # Its text would be the piece that isn't a port: perhaps of a password.
        raise ProfileStoreError(
            f"can't use the profile database {safe_url(url)}: it can't be parsed; "
            "is its port a number? (--db takes a file path or a SQLAlchemy URL)"
        ) from None
    except ImportError as error:
        # psycopg without its C library is one, too.
        way = "is its driver installed?"
        if url.partition("://")[0] in (*POSTGRES, POSTGRES_DRIVER):
            way = "its driver comes with `pip install 'adaptspec[postgres]'`"
        raise ProfileStoreError(
            f"can't use the profile database {safe_url(url)}: "
            f"{str(error).splitlines()[0]}; {way} "
            "(--db takes a file path or a SQLAlchemy URL)"
        ) from error
    except (ArgumentError, OSError, RuntimeError, SQLAlchemyError) as error:
        raise ProfileStoreError(
            f"can't use the profile database {safe_url(url)}: "
            f"{str(error).splitlines()[0]} "
            "(--db takes a file path or a SQLAlchemy URL)"
        ) from error

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        if not on_network:
            _log_ahead(cursor)
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        reads = connection.get_execution_options().get(READING)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def reading(engine: Engine) -> Engine:
    """``engine`` for transactions that only read: they take no lock to write."""
    return engine.execution_options(**{READING: True})


def on_network_file_system(path: Path) -> bool:
    """Whether ``path`` lies on a file system that several hosts may share."""
    import psutil  # type: ignore[import-untyped]

    parts = path.resolve().parts
    kind, depth = "", 0
    try:
        mounted = psutil.disk_partitions(all=True)
    except OSError:  # no /proc
        return False
    for disk in mounted:
        mount = Path(disk.mountpoint).parts
        # The last of the longest: mounts may cover one another.
        if depth <= len(mount) and parts[: len(mount)] == mount:
            kind, depth = disk.fstype.lower(), len(mount)
    return kind.startswith(NETWORK)


def _log_ahead(cursor: Any) -> None:
    """Let readers and a writer not wait for each other, where SQLite can.

    The mode is kept in the file. SQLite itself stays in the old one for a database in
    memory, a read-only file, and where it finds no shared memory; all works there, too.
    """
    cursor.execute(f"PRAGMA busy_timeout = {LOG_AHEAD_SECONDS * 1000}")
    # Refused, or in use all that time: the next opening tries again.
    with suppress(sqlite3.OperationalError):
        cursor.execute("PRAGMA journal_mode = WAL")


def beside(url: URL) -> Path | None:
    """The folder for files that belong to the database at ``url``."""
    if url.get_backend_name() != "sqlite":
        from platformdirs import user_data_path

        return user_data_path("adaptspec")
    file = file_of(url)
    return None if file is None else file.absolute().parent


def file_of(url: URL) -> Path | None:
    """The file of an SQLite URL; None in memory, or if only SQLite can tell."""
    name = url.database
    if not name or name == MEMORY or name.startswith("file:"):
        return None
    return Path(name)


def safe_url(url: str) -> str:
    """What may be printed of ``url``: neither password nor query, which may hold one.

    Cut by hand, so that it holds for a URL that can't be parsed as well.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        try:
            return f"sqlite:///{parsed_url(url).database}"
        except RuntimeError:  # the home of a user that isn't there
            return f"sqlite:///{url}"
    login, at, place = rest.rpartition("@")
    user = re.split(r"[:/?#]", login)[0]
    return f"{scheme}://{user}{at}{place.partition('?')[0]}"
