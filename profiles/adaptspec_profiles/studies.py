"""Optuna's own tables in the database of the profiles, so that its tools open them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import NullPool
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from adaptspec.errors import ProfileStoreError
from adaptspec_profiles.engine import BUSY_SECONDS, safe_url

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

OPENINGS = 5  # several processes may create the tables at once


def open_studies(url: URL) -> RDBStorage:
    """Optuna's storage on a database, its tables created if need be.

    Raises:
        ProfileStoreError: if they are another version's, or can't be used.
    """
    import optuna

    text = url.render_as_string(hide_password=False)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.get_backend_name() == "sqlite":
        # Optuna reads on one connection while it writes on another: no transaction
        # may begin before the first write, and that one by taking the lock to write.
        # Nothing stays open that a store closed later would have to wait for.
        connect = {"timeout": BUSY_SECONDS, "isolation_level": "IMMEDIATE"}
        options = {"poolclass": NullPool, "connect_args": connect}
    for attempt in range(OPENINGS):
        try:
            with _quiet():
                return optuna.storages.RDBStorage(text, engine_kwargs=options)
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            # Where transactions don't wait, another process made the tables meanwhile.
            if attempt == OPENINGS - 1:
                raise _failure(url, error) from error
        except RuntimeError as error:
            raise _failure(url, error) from error
    raise AssertionError


def delete_studies(storage: RDBStorage, run: str) -> None:
    """Forget the studies of ``run``."""
    for study in storage.get_all_studies():
        if study.study_name.startswith(f"{run}/"):
            storage.delete_study(study._study_id)


def close_studies(storage: RDBStorage) -> None:
    """Release connections."""
    storage.scoped_session.remove()
    storage.engine.dispose()


def _failure(url: URL, error: Exception) -> ProfileStoreError:
    shown = safe_url(url.render_as_string(hide_password=True))
    reason = (str(error.__cause__ or error) or repr(error)).splitlines()[0]
    return ProfileStoreError(
        f"can't keep Optuna's studies in {shown}: {reason} (another --db gets its own)"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Alembic from setting up the logging of a process that hasn't."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        with closing(handler), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's experimental options
            yield
    finally:
        root.removeHandler(handler)
