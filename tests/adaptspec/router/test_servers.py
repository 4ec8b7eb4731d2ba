"""In which order servers are asked."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import pytest

from adaptspec.router.servers import Servers, Unreached
from adaptspec.router.table import RouteTable
from adaptspec.testing.fakes import FakeClock
from upstreams import World

URLS = {"a": ["http://a1", "http://a2"], "b": "http://b", "plain": "http://plain"}


def servers_of(clock: Any = None, **more: Any) -> Servers:
    table = {"servers": URLS, "default": "plain", **more}
    options = {} if clock is None else {"clock": clock}
    return Servers(RouteTable.model_validate(table), **options)


def names(found: Sequence[tuple[str, str]]) -> list[str]:
    return [url.removeprefix("http://") for _, url in found]


def test_the_servers_own_urls_go_first_then_the_default_then_the_others() -> None:
    servers = servers_of()
    assert names(servers.candidates("a")) == ["a1", "a2", "plain", "b"]
    assert names(servers.candidates("a")) == ["a2", "a1", "plain", "b"]
    assert names(servers.candidates("plain")) == ["plain", "a1", "a2", "b"]


def test_without_fallback_there_are_no_others() -> None:
    servers = servers_of(fallback=False)
    assert names(servers.candidates("a")) == ["a1", "a2"]
    assert names(servers.candidates("b")) == ["b"]


def test_what_was_down_goes_last_for_a_while(world: World) -> None:
    clock = FakeClock()
    gone, up = world.server(), world.server().url
    down = gone.url
    world.run(gone.stop())
    table = {"servers": {"a": [down, up]}, "default": "a"}
    servers = Servers(RouteTable.model_validate(table), clock=clock)

    async def ask() -> str:
        reached = await servers.ask("a", "POST", "/v1/completions", [], b"{}")
        await reached.response.aclose()
        return reached.url

    def firsts() -> set[str]:
        """Whom two requests ask first, whose turn would be each one's."""
        return {servers.candidates("a")[0][1] for _ in range(2)}

    assert firsts() == {down, up}
    assert anyio.run(ask) == up
    clock.advance(4.9)
    assert firsts() == {up}
    clock.advance(0.2)
    assert firsts() == {down, up}


def test_headers_that_cannot_be_sent_are_the_clients_fault(world: World) -> None:
    table = {"servers": {"a": world.server().url, "b": world.server().url}}
    servers = Servers(RouteTable.model_validate({**table, "default": "a"}))
    before = servers.candidates("a")

    async def ask() -> None:
        await servers.ask("a", "POST", "/v1/completions", [(b"x", b"a\x00b")], b"{}")

    with pytest.raises(Unreached, match="headers can't be passed on") as refused:
        anyio.run(ask)
    assert refused.value.status == 400
    assert servers.candidates("a") == before  # none counts as down


@contextmanager
def no_more_files() -> Iterator[None]:
    """Inside, this process can't open another file."""
    gc.collect()  # what others left would be closed meanwhile
    limits, opened = resource.getrlimit(resource.RLIMIT_NOFILE), []
    first = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first + 64, limits[1]))
    try:
        with suppress(OSError):
            while True:
                opened.append(os.dup(first))
        yield
    finally:
        for file in [first, *opened]:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_router_without_files_calls_no_server_down(world: World) -> None:
    url = world.server().url
    for address in (url, url.replace("127.0.0.1", "localhost")):
        table = {"servers": {"a": address, "b": "http://other"}, "default": "a"}
        servers = Servers(RouteTable.model_validate(table))

        async def ask(servers: Servers = servers) -> None:
            with no_more_files():
                await servers.ask("a", "POST", "/v1/completions", [], b"{}")

        with pytest.raises(Unreached, match="too many files are open") as refused:
            anyio.run(ask)
        assert (refused.value.status, refused.value.code) == (503, "too_many_files")
        assert servers.candidates("a")[0][1] == address
