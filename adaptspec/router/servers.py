"""Asks the servers of a table: the right one first, others where it is down."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count

import anyio
import httpx2

from adaptspec.router.table import RouteTable

Headers = Sequence[tuple[bytes, bytes]]
UNAVAILABLE = 503
NO_MORE_FILES = (errno.EMFILE, errno.ENFILE)  # of this process, of the machine


@dataclass(frozen=True)
class Reached:
    """A server's answer, whose body is still to come; whoever has it closes it."""

    server: str
    url: str
    response: httpx2.Response


class Unreached(Exception):
    """No server that may be asked answers.

    Args:
        status: Of HTTP, for the client.
        code: Of the client's error.
    """

    def __init__(self, told: str, status: int, code: str) -> None:
        super().__init__(told)
        self.status, self.code = status, code


class Servers:
    """The servers of a table.

    A request has a connection of its own, which is closed with it: a server that closes
    an idle connection just when it is used again would look as if it were down.

    Args:
        connect_timeout: Seconds to wait for a connection. Nothing else is timed: an
            answer takes as long as it takes.
        pause: Seconds for which a server that was down is asked after the others.
    """

    def __init__(
        self,
        table: RouteTable,
        connect_timeout: float = 5.0,
        pause: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table, self._connect, self._pause = table, connect_timeout, pause
        self._clock = clock
        self._turns = {name: count() for name in table.servers}
        self._down_until: dict[str, float] = {}
        # The transport rather than a client: no cookies, redirects or proxies.
        self._transport = httpx2.AsyncHTTPTransport(
            limits=httpx2.Limits(max_keepalive_connections=0), trust_env=False
        )

    async def ask(
        self, server: str, method: str, path: str, headers: Headers, body: bytes
    ) -> Reached:
        """The answer's beginning, from ``server`` or where it is down from another.

        A server that took the request and then broke off isn't followed by another: the
        request may be what ended it, and would end them all.

        Args:
            path: With its query, as it was asked for.

        Raises:
            Unreached: if none answers that may be asked.
        """
        problems: dict[str, str] = {}
        candidates = self.candidates(server)
        for place, (name, url) in enumerate(candidates, start=1):
            try:
                response = await self._send(url, method, path, headers, body)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                if _out_of_files(error):
                    told = (
                        "no server can be asked: too many files are open (a request "
                        "takes two); raise the limit (ulimit -n), or take fewer "
                        "requests at a time (--max-requests)"
                    )
                    raise Unreached(told, UNAVAILABLE, "too_many_files") from None
                problems[url] = "is down"
                self._down_until[url] = self._clock() + self._pause
                continue
            except httpx2.LocalProtocolError:  # the client's, and nothing was sent
                told = "the request's headers can't be passed on: they aren't HTTP's"
                raise Unreached(told, 400, "invalid_headers") from None
            except httpx2.TransportError:
                told = f"{url} closed the connection before it answered"
                raise Unreached(told, 502, "server_broke_off") from None
            # It loads its model, or has too much to do.
            if response.status_code == UNAVAILABLE and place < len(candidates):
                await _close(response)
                problems[url] = "is unavailable"
                continue
            self._down_until.pop(url, None)
            return Reached(name, url, response)
        told = ", ".join(f"{url} {problem}" for url, problem in problems.items())
        raise Unreached(f"no server answers: {told}", UNAVAILABLE, "server_down")

    def candidates(self, server: str) -> list[tuple[str, str]]:
        """Names and URLs in the order in which they are asked."""
        names = [server]
        if self._table.fallback:
            names += [self._table.default, *self._table.servers]
        found = []
        for name in dict.fromkeys(names):
            urls = self._table.servers[name]
            first = next(self._turns[name]) % len(urls) if name == server else 0
            found += [(name, url) for url in urls[first:] + urls[:first]]
        now = self._clock()
        return sorted(found, key=lambda pair: self._down_until.get(pair[1], now) > now)

    async def health(self, seconds: float = 2.0) -> dict[str, dict[str, bool]]:
        """Server -> URL -> whether it says that it is well, within so many seconds."""
        found: dict[str, dict[str, bool]] = {name: {} for name in self._table.servers}

        async def look(name: str, url: str) -> None:
            found[name][url] = False
            with anyio.move_on_after(seconds):
                try:
                    response = await self._send(url, "GET", "/health", [], b"")
                except httpx2.TransportError:
                    return
                await _close(response)
                found[name][url] = response.status_code < 400

        async with anyio.create_task_group() as group:
            for name, urls in self._table.servers.items():
                for url in urls:
                    group.start_soon(look, name, url)
        return found

    async def close(self) -> None:
        """Close what is still open."""
        await self._transport.aclose()

    async def _send(
        self, url: str, method: str, path: str, headers: Headers, body: bytes
    ) -> httpx2.Response:
        request = httpx2.Request(
            method,
            url + path,
            headers=list(headers),
            content=body or None,
            extensions={"timeout": {"connect": self._connect}},
        )
        return await self._transport.handle_async_request(request)


def _out_of_files(error: BaseException | None) -> bool:
    """Whether a connection failed since this process or machine has no more files."""
    while error is not None:
        each: Sequence[BaseException] = getattr(error, "exceptions", ())  # a group's
        if any(map(_out_of_files, each)):
            return True
        if isinstance(error, OSError) and error.errno in NO_MORE_FILES:
            return True
        # A look-up that has none fails as that of an unknown name, or otherwise.
        known = isinstance(error, ConnectionError | TimeoutError)
        if isinstance(error, OSError) and not known:
            try:
                with ExitStack() as several:  # it takes more than one at a time
                    for _ in range(4):
                        several.enter_context(socket.socket())
            except OSError as missing:
                return missing.errno in NO_MORE_FILES
        error = error.__cause__ or error.__context__
    return False


async def _close(response: httpx2.Response) -> None:
    """Close a response, whatever is cancelled meanwhile."""
    with anyio.CancelScope(shield=True):
        await response.aclose()
