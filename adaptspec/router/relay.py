"""Passes one request on and its answer back, byte for byte as it comes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import anyio
import httpx2

from adaptspec.errors import RoutingError
from adaptspec.router.answers import error_answer
from adaptspec.router.classing import (
    CLASS_HEADER,
    NotJson,
    as_header,
    named_class,
    read_body,
    told_class,
)
from adaptspec.router.counts import Counts
from adaptspec.router.headers import answer_headers, request_headers, value_of
from adaptspec.router.servers import Reached, Servers, Unreached
from adaptspec.router.table import RouteTable

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

SERVER_HEADER = "x-adaptspec-server"
LONG_BODY = 1 << 20  # bytes from which reading it would keep other requests waiting
LINGER_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What the router takes on.

    Args:
        body: Bytes of a request.
        requests: Requests that are answered at the same time.
    """

    body: int = 64 << 20
    requests: int = 1024


class _Refused(Exception):
    """A request that isn't passed on.

    Args:
        unread: Whether its body wasn't read to its end.
    """

    def __init__(
        self, status: int, message: str, code: str, unread: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.unread = status, code, unread


class _Left(Exception):
    """The client is gone before its request was read."""


class Relay:
    """The ASGI application behind the paths that are passed on.

    While a server is waited for or streams, the client's connection is watched: when it
    closes, the request to the server is closed at once.
    """

    def __init__(
        self, table: RouteTable, servers: Servers, counts: Counts, limits: Limits
    ) -> None:
        self._table, self._servers = table, servers
        self._counts, self._limits = counts, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            if self._counts.open >= self._limits.requests:
                raise _Refused(
                    503,
                    f"{self._limits.requests} requests are being answered, which is "
                    "the most at a time (--max-requests); try again later",
                    "too_many_requests",
                    unread=True,
                )
            if {".", ".."} & set(scope["path"].split("/")):
                # It would lead to another path of the server.
                raise _Refused(
                    404,
                    f"{scope['path']}: a path with '.' or '..' isn't passed on",
                    "not_found",
                    unread=True,
                )
            with self._counts.request():
                body = await self._body(scope, receive)
                prompt_class = await self._class_of(scope, body)
                await self._watched(scope, receive, send, body, prompt_class)
        except _Left:
            self._counts.ended_early("client")
        except _Refused as refused:
            headers = None
            if refused.unread:
                headers = {"connection": "close"}
                await _linger(scope, receive)
            answer = error_answer(refused.status, str(refused), refused.code, headers)
            await answer(scope, receive, send)

    async def _watched(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        body: bytes,
        prompt_class: str | None,
    ) -> None:
        """Pass the request on until it is answered or the client leaves."""
        finished = False
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            await self._pass_on(scope, send, body, prompt_class)
            finished = True
            group.cancel_scope.cancel()
        if not finished:
            self._counts.ended_early("client")

    async def _pass_on(
        self, scope: Scope, send: Send, body: bytes, prompt_class: str | None
    ) -> None:
        server = self._table.server_of(prompt_class)
        path = scope["raw_path"].decode("ascii")
        if query := scope["query_string"]:
            path += "?" + query.decode("latin-1")
        headers = request_headers(scope["headers"])
        try:
            reached = await self._servers.ask(
                server, scope["method"], path, headers, body
            )
        except Unreached as error:
            log.warning("%s", error)
            told = self._told(prompt_class, server)
            answer = error_answer(error.status, str(error), error.code, told)
            await answer(scope, _nothing, send)
            return
        try:
            await self._stream(reached, send, prompt_class)
        finally:
            with anyio.CancelScope(shield=True):
                await reached.response.aclose()

    async def _stream(
        self, reached: Reached, send: Send, prompt_class: str | None
    ) -> None:
        response = reached.response
        self._counts.answered(prompt_class, reached.server, response.status_code)
        told = self._told(prompt_class, reached.server)
        start = {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": [
                *answer_headers(response.headers.raw),
                *((key.encode(), value.encode()) for key, value in told.items()),
            ],
        }
        await send(start)
        try:
            async for piece in response.aiter_raw():
                await send(
                    {"type": "http.response.body", "body": piece, "more_body": True}
                )
        except httpx2.TransportError:
            # The end isn't sent, so that the client's connection breaks, too.
            log.warning("%s broke off its answer", reached.url)
            self._counts.ended_early("server")
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _told(self, prompt_class: str | None, server: str) -> dict[str, str]:
        """Headers that say how the request was routed."""
        told = {SERVER_HEADER: server}
        if prompt_class is not None:
            told[CLASS_HEADER] = as_header(prompt_class)
        return told

    async def _class_of(self, scope: Scope, body: bytes) -> str | None:
        """What class the request's prompt is of; None where it can't be told."""
        headers = scope["headers"]
        named = value_of(headers, CLASS_HEADER.encode())
        try:
            found = None if named is None else named_class(self._table, named)
        except RoutingError as error:
            raise _Refused(400, str(error), "unknown_class") from None
        packed = value_of(headers, b"content-encoding")
        if scope["method"] != "POST" or (packed or "identity") != "identity":
            return found
        try:
            if len(body) >= LONG_BODY:
                value = await anyio.to_thread.run_sync(read_body, body)
            else:
                value = read_body(body)
        except NotJson as error:
            raise _Refused(
                400, f"the body isn't JSON: {error}", "invalid_json"
            ) from None
        return told_class(self._table.teller, value) if found is None else found

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The request's whole body, as long as it is allowed to be."""
        most = self._limits.body
        refused = _Refused(
            413,
            f"a request has at most {most} bytes (--max-body)",
            "request_too_large",
            unread=True,
        )
        declared = value_of(scope["headers"], b"content-length") or "0"
        if declared.isdigit() and int(declared) > most:
            raise refused
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Left
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise refused
            if not message.get("more_body", False):
                return b"".join(parts)


async def _linger(scope: Scope, receive: Receive) -> None:
    """Read what a client still sends for a while, and keep none of it.

    A connection that is closed before may be reset, and the answer be lost with it.
    """
    if value_of(scope["headers"], b"expect") is not None:
        return  # it waits for a word before it sends
    with anyio.move_on_after(LINGER_SECONDS):
        while (message := await receive())["type"] != "http.disconnect":
            if not message.get("more_body", False):
                return


async def _nothing() -> MutableMapping[str, Any]:
    """What is received where nothing is waited for."""
    return {"type": "http.disconnect"}
