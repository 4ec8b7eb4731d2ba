"""Servers that answer as a test says, and the router before them, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

from adaptspec.router.table import RouteTable

T = TypeVar("T")

PACKAGES = ("starlette", "uvicorn", "prometheus_client")


def skip_without_packages() -> None:
    """Skip a test module where what the router runs on isn't installed."""
    for name in PACKAGES:
        pytest.importorskip(name, reason="needs `pip install 'adaptspec[router]'`")


@dataclass
class Received:
    """A request as it came over the wire."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return dict((k.lower(), v) for k, v in self.headers).get(name.lower())


@dataclass
class Conversation:
    """What a fake server answers with: plain bytes to its connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def start(
        self, status: str = "200 OK", *headers: str, chunked: bool = True
    ) -> None:
        lines = [f"HTTP/1.1 {status}", *headers]
        lines += ["Transfer-Encoding: chunked"] if chunked else []
        await self.raw("\r\n".join(lines).encode() + b"\r\n\r\n")

    async def piece(self, data: bytes) -> None:
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def whole(self, body: bytes, status: str = "200 OK", *headers: str) -> None:
        length = f"Content-Length: {len(body)}"
        await self.start(status, length, *headers, chunked=False)
        await self.raw(body)


Answering = Callable[[Received, Conversation], Awaitable[None]]


async def echo(request: Received, to: Conversation) -> None:
    """Answers with the body that it got."""
    await to.whole(request.body, "200 OK", "Content-Type: application/json")


async def breaks_off(request: Received, to: Conversation) -> None:
    """Closes the connection without a word."""


@dataclass
class FakeServer:
    """A server on a free port of loopback."""

    answer: Answering = echo
    received: list[Received] = field(default_factory=list)
    open: int = 0
    port: int = 0
    server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self.server = await asyncio.start_server(self._handle, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self.server is not None
        self.server.close()

    async def _handle(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.open += 1
        try:
            request = await _read(reader)
            if request is not None:
                self.received.append(request)
                await self.answer(request, Conversation(reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def _read(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None  # somebody only looked whether it is there
    first, *lines = head.rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = [(k, v.strip()) for k, _, v in (line.partition(":") for line in lines)]
    length = dict((k.lower(), v) for k, v in headers).get("content-length", "0")
    return Received(method, target, headers, await reader.readexactly(int(length)))


class World:
    """An event loop in a thread of its own, with fake servers and routers in it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._stops: list[Callable[[], Coroutine[Any, Any, None]]] = []

    def run(self, work: Coroutine[Any, Any, T], seconds: float = 30) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def server(self, answer: Answering = echo) -> FakeServer:
        server = FakeServer(answer)
        self.run(server.start())
        self._stops.append(server.stop)
        return server

    def router(self, table: Mapping[str, Any], **options: Any) -> Router:
        router = Router(RouteTable.model_validate(dict(table)), **options)
        self.run(router.start())
        self._stops.append(router.stop)
        return router

    def tasks(self) -> int:
        """How many are alive in the loop."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return self.run(count())

    def close(self) -> None:
        for stop in reversed(self._stops):
            self.run(stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Router:
    """The router on a free port of loopback."""

    def __init__(self, table: RouteTable, **options: Any) -> None:
        import uvicorn

        from adaptspec.router.app import make_app

        self.app = make_app(table, **options)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(
            self.app,
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def open(self) -> int:
        """How many requests it is answering."""
        return int(self.app.state.counts.open)

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._server.should_exit = True
        await self._task

    def ask(
        self,
        body: bytes | Mapping[str, Any],
        path: str = "/v1/chat/completions",
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case and body of an answer that is read whole."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, data, dict(headers or {}))
            answer = connection.getresponse()
            found = {k.lower(): v for k, v in answer.getheaders()}
            return answer.status, found, answer.read()
        finally:
            connection.close()

    def connect(self, data: bytes) -> socket.socket:
        """A connection on which ``data`` was sent as it is."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(data)
        return connection


def request_bytes(body: bytes, path: str = "/v1/chat/completions") -> bytes:
    """A request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def becomes_true(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether it does, within more time than it should ever take."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
