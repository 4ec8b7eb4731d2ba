"""Optuna's own tables in the database of the profiles, so that its tools open them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import NullPool
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from adaptspec.errors import ProfileStoreError
from adaptspec_profiles.engine import BUSY_SECONDS, safe_url

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

SERVING = 10  # requests at once
OPENINGS = 5  # several processes may create the tables at once


def open_studies(url: URL) -> RDBStorage:
    """Optuna's storage on a database, its tables created if need be.

    Raises:
        ProfileStoreError: if they are another version's, or can't be used.
    """
    import optuna

    from adaptspec_profiles.claims import ClaimingStorage

    text = url.render_as_string(hide_password=False)
    options: dict[str, Any] = {"pool_pre_ping": True}
    kind = optuna.storages.RDBStorage
    if url.get_backend_name() == "sqlite":
        # Optuna reads on one connection while it writes on another: no transaction
        # may begin before the first write, and that one by taking the lock to write.
        # Nothing stays open that a store closed later would have to wait for.
        connect = {"timeout": BUSY_SECONDS, "isolation_level": "IMMEDIATE"}
        options = {"poolclass": NullPool, "connect_args": connect}
        kind = ClaimingStorage
    for attempt in range(OPENINGS):
        try:
            with _quiet():
                return kind(text, engine_kwargs=options)
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            # Where transactions don't wait, another process made the tables meanwhile.
            if attempt == OPENINGS - 1:
                raise _failure(url, error) from error
        except RuntimeError as error:
            raise _failure(url, error) from error
    raise AssertionError


def serve_studies(
    storage: RDBStorage, host: str, port: int, ready: Callable[[int], None]
) -> None:
    """Serve them through Optuna's gRPC proxy until interrupted.

    Args:
        port: 0 takes a free one.
        ready: Told the port once it listens.

    Raises:
        ProfileStoreError: without grpcio, or where the port can't be had.
    """
    try:
        import grpc
        import optuna
        from optuna.storages._grpc.auto_generated import api_pb2_grpc
        from optuna.storages._grpc.servicer import OptunaStorageProxyService
    except ImportError as error:
        raise ProfileStoreError(
            f"serving studies needs gRPC ({error}); `pip install 'adaptspec[grpc]'`"
        ) from error
    # Optuna's own run_grpc_proxy_server says neither its port nor that it has none.
    server = grpc.server(ThreadPoolExecutor(max_workers=SERVING))
    add: Any = api_pb2_grpc.add_StorageServiceServicer_to_server
    cached = optuna.storages.get_storage(storage)
    add(OptunaStorageProxyService(cached), server)
    try:
        taken = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise ProfileStoreError(
            f"can't serve at {host}:{port}: {error}; give another --port"
        ) from error
    server.start()
    ready(taken)
    try:
        server.wait_for_termination()
    finally:
        server.stop(grace=1.0)


def delete_studies(storage: RDBStorage, run: str) -> None:
    """Forget the studies of ``run``.

    Raises:
        ProfileStoreError: if they can't be written.
    """
    import optuna

    try:
        for study in storage.get_all_studies():
            if study.study_name.startswith(f"{run}/"):
                storage.delete_study(study._study_id)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise _failure(storage.engine.url, error) from error


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
