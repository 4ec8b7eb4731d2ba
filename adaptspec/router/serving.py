"""Runs the router until it is told to end."""

from __future__ import annotations

import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from adaptspec.errors import RoutingError
from adaptspec.router.app import make_app
from adaptspec.router.relay import Limits
from adaptspec.router.table import RouteTable


def serve(
    table: RouteTable,
    host: str,
    port: int,
    limits: Limits,
    *,
    connect_timeout: float = 5.0,
    grace: float = 30.0,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Answer on ``host`` and ``port`` until SIGTERM or Ctrl-C.

    Then no more requests are taken; those that are being answered may go on. From the
    beginning the process may have as many files open as the system allows: a request
    takes two.

    Args:
        port: 0: one that is free.
        grace: Seconds for which they may.
        ready: Is told the router's URL when it takes requests.

    Raises:
        RoutingError: if it can't listen there.
    """
    _allow_more_files()
    listening = _listening(host, port)
    taken = listening.getsockname()[1]
    address = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        make_app(table, limits, connect_timeout=connect_timeout),
        log_config=None,  # by default it writes a line for each request
        access_log=False,
        server_header=False,
        date_header=False,
        # Longer than clients keep a connection (5 s, as is the default here; proxies
        # 60 s): one would send a request just when it is closed here.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(grace),
    )
    server = uvicorn.Server(config)
    with listening, _told_by_signal(server), _quiet():
        listening.listen(config.backlog)
        ready(f"http://{address}:{taken}")
        server.run(sockets=[listening])


def _allow_more_files() -> None:
    """Raise the limit of open files as far as it may be raised."""
    with suppress(ImportError, OSError, ValueError):  # not every system has it
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _listening(host: str, port: int) -> socket.socket:
    """A socket bound there, which doesn't take connections yet."""
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RoutingError(
            f"can't listen on {host} port {port}: {reason}; pass another --host or "
            "--port"
        ) from None
    return bound


@contextmanager
def _told_by_signal(server: uvicorn.Server) -> Iterator[None]:
    """Inside, SIGTERM ends the server and then nothing else.

    uvicorn's own handlers stand only while it runs: it may come before, and uvicorn
    raises it again when it has ended.
    """

    def end(*_: Any) -> None:
        server.should_exit = True

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, an answer that is broken off because its server broke it off isn't told
    as a fault of this program; the relay tells it."""
    logger = logging.getLogger("uvicorn.error")

    def keeps(record: Any) -> bool:
        return "without completing response" not in str(record.msg)

    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)
