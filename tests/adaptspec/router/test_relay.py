"""What arrives at a server and what comes back, byte for byte."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from classifiers import LONG, SHORT, by_hand
from upstreams import (
    Conversation,
    FakeServer,
    Received,
    Router,
    World,
    becomes_true,
    breaks_off,
    request_bytes,
    skip_without_packages,
)

skip_without_packages()
from adaptspec.router.relay import Limits  # noqa: E402

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def messages(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def table(servers: dict[str, Any], **more: Any) -> dict[str, Any]:
    first = next(iter(servers))
    return {"servers": servers, "default": first, **more}


def error_of(body: bytes) -> dict[str, Any]:
    """The error as OpenAI's clients read it."""
    found = json.loads(body)
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return dict(found["error"])


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FakeServer, Router]]:
    """One server and router for many examples."""
    world = World()
    server = world.server()
    classes = {"short": "only", "long": "only"}
    yield (
        server,
        world.router(
            table({"only": server.url}, classes=classes, classifier=by_hand().as_json())
        ),
    )
    world.close()


@given(
    JSON, st.booleans(), st.sampled_from([None, 1, "\t"]), st.sampled_from([CHAT, TEXT])
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_arrives_byte_for_byte_and_so_does_the_answer(
    shared: tuple[FakeServer, Router],
    value: Any,
    ascii_only: bool,
    indent: Any,
    path: str,
) -> None:
    server, router = shared
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    body = text.encode("utf-8", "surrogatepass" if ascii_only else "replace")
    status, _, answer = router.ask(body, path)
    assert (status, answer) == (200, body)
    assert server.received[-1].body == body
    assert server.received[-1].target == path


@pytest.mark.parametrize(
    "more",
    [
        {"stream": True, "n": 3, "temperature": 0.7, "logprobs": True, "seed": 1},
        {
            "tools": [
                {"type": "function", "function": {"name": "größe", "parameters": {}}}
            ]
        },
        {"response_format": {"type": "json_object"}, "logit_bias": {"5": -100}},
        {"model": "模型/\u2028", "stop": ["\n\n", "\u0000"], "user": "\U0001f600"},
    ],
)
def test_what_a_request_asks_for_is_passed_on(
    shared: tuple[FakeServer, Router], more: dict[str, Any]
) -> None:
    server, router = shared
    asked = messages(SHORT, **more)
    router.ask(asked)
    assert json.loads(server.received[-1].body) == asked


def test_headers_of_the_message_go_on_and_those_of_a_connection_do_not(
    shared: tuple[FakeServer, Router],
) -> None:
    server, router = shared
    headers = {
        "Authorization": "Bearer key",
        "User-Agent": "mine/1",
        "Accept-Encoding": "br, gzip",
        "X-Request-Id": "7",
        "Connection": "keep-alive, x-hop",
        "X-Hop": "1",
        "TE": "trailers",
        "x-adaptspec-class": "short",
    }
    router.ask(messages(LONG), CHAT + "?a=%20b&c", headers)
    got = server.received[-1]
    assert got.target == CHAT + "?a=%20b&c"
    assert got.header("host") == server.url.removeprefix("http://")
    for name in ("Authorization", "User-Agent", "Accept-Encoding", "X-Request-Id"):
        assert got.header(name) == headers[name]
    for name in ("X-Hop", "TE", "x-adaptspec-class", "Accept"):
        assert got.header(name) is None


def test_status_headers_and_body_of_an_answer_are_the_servers(world: World) -> None:
    packed = gzip.compress(b"{}")

    async def answer(request: Received, to: Conversation) -> None:
        await to.whole(
            packed,
            "418 I'm a teapot",
            "Content-Encoding: gzip",
            "Set-Cookie: a=1",
            "Set-Cookie: b=2",
            "X-Mine: yes",
            "Connection: close, x-hop",
            "X-Hop: 1",
            "x-adaptspec-server: a lie",
        )

    router = world.router(table({"a": world.server(answer).url}))
    seen = b""
    with router.connect(request_bytes(b"{}")) as connection:
        while not seen.endswith(packed):
            seen += connection.recv(65536)
    head, _, body = seen.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0].startswith("http/1.1 418")
    assert body == packed
    for line in ("content-encoding: gzip", "set-cookie: a=1", "set-cookie: b=2"):
        assert line in lines
    assert f"content-length: {len(packed)}" in lines
    assert "x-adaptspec-server: a" in lines
    assert not [line for line in lines if "x-hop" in line or "a lie" in line]


def test_cookies_of_one_client_are_not_told_to_another(world: World) -> None:
    async def answer(request: Received, to: Conversation) -> None:
        await to.whole(b"{}", "200 OK", "Set-Cookie: session=secret; Path=/")

    server = world.server(answer)
    router = world.router(table({"a": server.url}))
    for _ in range(2):
        router.ask(b"{}")
    assert server.received[-1].header("cookie") is None


def test_each_class_goes_to_its_server_and_the_answer_says_so(world: World) -> None:
    ngram, draft, plain = world.server(), world.server(), world.server()
    router = world.router(
        {
            "servers": {"ngram": ngram.url, "draft": draft.url, "plain": plain.url},
            "classes": {"short": "ngram", "long": "draft", "été": "draft"},
            "default": "plain",
            "classifier": by_hand().as_json(),
        }
    )
    cases: list[tuple[dict[str, Any], str, dict[str, str], str | None, FakeServer]] = [
        (messages(SHORT), CHAT, {}, "short", ngram),
        (messages(LONG), CHAT, {}, "long", draft),
        ({"prompt": LONG}, TEXT, {}, "long", draft),
        ({"prompt": [1, 2]}, TEXT, {}, None, plain),
        (messages("unlike either of the two"), CHAT, {}, None, plain),
        (messages(SHORT), CHAT, {"x-adaptspec-class": "long"}, "long", draft),
        (messages(SHORT), CHAT, {"X-AdaptSpec-Class": "%C3%A9t%C3%A9"}, "été", draft),
    ]
    names = {id(ngram): "ngram", id(draft): "draft", id(plain): "plain"}
    for asked, path, headers, prompt_class, server in cases:
        before = len(server.received)
        _, told, _ = router.ask(asked, path, headers)
        assert len(server.received) == before + 1
        assert told["x-adaptspec-server"] == names[id(server)]
        shown = "%C3%A9t%C3%A9" if prompt_class == "été" else prompt_class
        assert told.get("x-adaptspec-class") == shown


def test_several_urls_of_a_server_are_taken_in_turn(world: World) -> None:
    servers = [world.server() for _ in range(3)]
    router = world.router(table({"a": [server.url for server in servers]}))
    for _ in range(7):
        router.ask(messages(SHORT))
    assert [len(server.received) for server in servers] == [3, 2, 2]


def test_the_models_of_the_default_server_are_listed(world: World) -> None:
    async def answer(request: Received, to: Conversation) -> None:
        await to.whole(f"{request.method} {request.target}".encode())

    router = world.router(table({"a": world.server(answer).url}))
    for path in ("/v1/models", "/v1/models/org%2Fa%3Fb%20c", "/v1/models/org/a?b=%20"):
        _, _, body = router.ask(b"", path, method="GET")
        assert body == f"GET {path}".encode()


@pytest.mark.parametrize("up", ["../..", "%2e%2e/%2E."])
def test_no_models_name_leads_to_another_path(world: World, up: str) -> None:
    """A server's slots tell what others asked."""
    server = world.server()
    router = world.router(table({"a": server.url}))
    status, _, answer = router.ask(b"", f"/v1/models/{up}/slots", method="GET")
    assert status == 404
    assert "isn't passed on" in error_of(answer)["message"]
    assert server.received == []


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/models", "/v1/models/a"])
def test_a_browser_learns_from_the_default_server_what_it_may_ask(
    world: World, path: str
) -> None:
    async def answer(request: Received, to: Conversation) -> None:
        origin = request.header("origin")
        await to.whole(b"", "200 OK", f"Access-Control-Allow-Origin: {origin}")

    default, other = world.server(answer), world.server()
    router = world.router(table({"a": default.url, "b": other.url}))
    asked = {
        "Origin": "http://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, x-adaptspec-class",
    }
    status, headers, body = router.ask(b"", path, asked, method="OPTIONS")
    assert (status, body) == (200, b"")
    assert headers["access-control-allow-origin"] == "http://page.example"
    assert default.received[-1].method == "OPTIONS"
    assert other.received == []


def test_pieces_come_as_soon_as_the_server_sends_them(world: World) -> None:
    """The server sends the next one only when the client has the one before."""
    seen = [asyncio.Event() for _ in range(20)]

    async def answer(request: Received, to: Conversation) -> None:
        await to.start("200 OK", "Content-Type: text/event-stream")
        for number, event in enumerate(seen):
            await to.piece(f"data: {number}\n\n".encode())
            await event.wait()
        await to.end()

    router = world.router(table({"a": world.server(answer).url}))
    connection = router.connect(request_bytes(json.dumps({"stream": True}).encode()))
    with connection, connection.makefile("rb") as stream:
        while stream.readline().strip():
            pass  # the head
        for number, event in enumerate(seen):
            size = int(stream.readline(), 16)
            piece = stream.read(size + 2)
            assert piece == f"data: {number}\n\n\r\n".encode()
            world.loop.call_soon_threadsafe(event.set)
        assert stream.readline() == b"0\r\n"


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_stream_of_any_bytes_arrives_as_it_was_sent(
    shared: tuple[FakeServer, Router], pieces: list[bytes]
) -> None:
    server, router = shared

    async def answer(request: Received, to: Conversation) -> None:
        await to.start()
        for piece in pieces:
            await to.piece(piece)
        await to.end()

    before, server.answer = server.answer, answer
    try:
        assert router.ask(b"{}")[2] == b"".join(pieces)
    finally:
        server.answer = before


@pytest.mark.parametrize(
    ("body", "told"),
    [(b"{", "line 1 column 2"), (b"", "line 1"), (b'{"a": "\xff"}', "byte")],
)
def test_what_is_no_json_is_refused_before_any_server_is_asked(
    world: World, body: bytes, told: str
) -> None:
    server = world.server()
    status, _, answer = world.router(table({"a": server.url})).ask(body)
    error = error_of(answer)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_json"
    assert told in error["message"]
    assert server.received == []


def test_packed_requests_are_passed_on_as_they_are(world: World) -> None:
    server = world.server()
    router = world.router(table({"a": server.url}))
    packed = gzip.compress(b'{"prompt": "x"}')
    assert router.ask(packed, TEXT, {"Content-Encoding": "gzip"})[0] == 200
    assert server.received[-1].body == packed
    assert server.received[-1].header("content-encoding") == "gzip"


def test_an_unknown_class_is_refused_with_the_known_ones(world: World) -> None:
    server = world.server()
    router = world.router(table({"a": server.url}, classes={"code": "a"}))
    status, _, answer = router.ask(messages("x"), headers={"x-adaptspec-class": "chat"})
    assert status == 400
    assert error_of(answer)["code"] == "unknown_class"
    assert "no class 'chat'; the table has: code" in error_of(answer)["message"]
    assert server.received == []


def test_other_paths_and_methods_are_errors_in_openais_shape(world: World) -> None:
    router = world.router(table({"a": world.server().url}))
    status, _, answer = router.ask(b"{}", "/v1/embeddings")
    assert status == 404
    assert "/v1/embeddings" in error_of(answer)["message"]
    status, headers, answer = router.ask(b"", CHAT, method="GET")
    assert status == 405
    assert set(headers["allow"].split(", ")) == {"POST", "OPTIONS"}
    assert error_of(answer)["type"] == "invalid_request_error"


def test_a_request_that_is_too_long_is_refused(world: World) -> None:
    server = world.server()
    router = world.router(table({"a": server.url}), limits=Limits(body=1000))
    fits = json.dumps({"prompt": "x" * 980}).encode()
    assert len(fits) <= 1000
    assert router.ask(fits)[0] == 200
    status, _, answer = router.ask(json.dumps({"prompt": "x" * 1000}).encode())
    assert status == 413
    assert "at most 1000 bytes" in error_of(answer)["message"]
    # Without a length it is found out while it comes; much of it, so that what the
    # connection holds doesn't suffice.
    data = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n"
    data += b"Transfer-Encoding: chunked\r\n\r\n"
    piece = b"%x\r\n%s\r\n" % (1 << 16, b" " * (1 << 16))
    with router.connect(data + piece * 200 + b"0\r\n\r\n") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert len(server.received) == 1


def test_no_more_requests_are_taken_on_than_the_limit(world: World) -> None:
    go = asyncio.Event()

    async def answer(request: Received, to: Conversation) -> None:
        await go.wait()
        await to.whole(b"{}")

    server = world.server(answer)
    router = world.router(table({"a": server.url}), limits=Limits(requests=2))
    waiting = [router.connect(request_bytes(b"{}")) for _ in range(2)]
    assert becomes_true(lambda: router.open == 2)
    status, _, body = router.ask(b"{}")
    assert status == 503
    assert error_of(body)["code"] == "too_many_requests"
    world.loop.call_soon_threadsafe(go.set)
    for connection in waiting:
        with connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert becomes_true(lambda: router.open == 0)
    assert router.ask(b"{}")[0] == 200


def until_left(left: threading.Event) -> Any:
    """Streams until its client's connection closes."""

    async def answer(request: Received, to: Conversation) -> None:
        await to.start("200 OK", "Content-Type: text/event-stream")

        async def pieces() -> None:
            while True:
                await to.piece(b"data: x\n\n")
                await asyncio.sleep(0.01)

        streaming = asyncio.create_task(pieces())
        await to.reader.read()  # ends when the other side closes
        left.set()
        streaming.cancel()

    return answer


def test_a_client_that_leaves_ends_the_request_to_the_server_at_once(
    world: World,
) -> None:
    left = threading.Event()
    server = world.server(until_left(left))
    router = world.router(table({"a": server.url}))
    connection = router.connect(request_bytes(b'{"stream": true}'))
    with connection:
        assert connection.recv(10)
        assert not left.is_set()
    assert left.wait(30)
    assert becomes_true(lambda: router.open == 0)


def test_a_client_that_leaves_before_the_first_piece_ends_it_too(world: World) -> None:
    """While the server reads a long prompt, say."""
    left, asked = threading.Event(), threading.Event()

    async def answer(request: Received, to: Conversation) -> None:
        asked.set()
        await to.reader.read()
        left.set()

    router = world.router(table({"a": world.server(answer).url}))
    with router.connect(request_bytes(b"{}")):
        assert asked.wait(30)
    assert left.wait(30)
    assert becomes_true(lambda: router.open == 0)


def test_a_client_that_leaves_within_its_request_leaves_nothing(world: World) -> None:
    server = world.server()
    router = world.router(table({"a": server.url}))
    with router.connect(request_bytes(b"{}" * 100)[:-100]):
        assert becomes_true(lambda: router.open == 1)
    assert becomes_true(lambda: router.open == 0)
    assert server.received == []


@pytest.mark.slow
def test_two_hundred_requests_with_disconnects_leave_nothing_behind(
    world: World,
) -> None:
    chance = random.Random(0)

    async def answer(request: Received, to: Conversation) -> None:
        await to.start("200 OK", "Content-Type: text/event-stream")
        for number in range(json.loads(request.body)["pieces"]):
            await to.piece(b"data: %d\n\n" % number)
            await asyncio.sleep(0)
        await to.end()

    servers = [world.server(answer) for _ in range(2)]
    router = world.router(
        table({"a": [server.url for server in servers]}, classes={"code": "a"})
    )

    def some() -> None:
        for _ in range(25):
            body = json.dumps({"pieces": chance.randrange(1, 40)}).encode()
            with router.connect(request_bytes(body)) as connection:
                for _ in range(chance.randrange(4)):
                    connection.recv(chance.randrange(1, 200))

    router.ask({"pieces": 1})
    assert becomes_true(lambda: router.open == 0)
    before = world.tasks()
    threads = [threading.Thread(target=some) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert becomes_true(lambda: router.open == 0)
    assert becomes_true(lambda: sum(server.open for server in servers) == 0)
    assert becomes_true(lambda: world.tasks() <= before)
    assert router.app.state.servers._transport._pool.connections == []
    assert router.ask({"pieces": 3})[2].count(b"data:") == 3


def test_an_answer_that_breaks_off_breaks_off_for_the_client(world: World) -> None:
    async def answer(request: Received, to: Conversation) -> None:
        await to.start()
        await to.piece(b"data: 1\n\n")

    router = world.router(table({"a": world.server(answer).url}))
    with router.connect(request_bytes(b"{}")) as connection:
        seen = b""
        while piece := connection.recv(1000):
            seen += piece
    assert seen.endswith(b"data: 1\n\n\r\n")  # and no last chunk
    assert becomes_true(lambda: router.open == 0)


def nobody() -> str:
    """The URL of a port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


async def loading(request: Received, to: Conversation) -> None:
    """What llama.cpp's server says while it loads its model."""
    body = (
        b'{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}'
    )
    await to.whole(body, "503 Service Unavailable")


@pytest.mark.parametrize("problem", ["down", "loads"])
def test_another_server_answers_for_one_that_does_not(
    world: World, problem: str
) -> None:
    plain = world.server()
    url = nobody() if problem == "down" else world.server(loading).url
    router = world.router(
        {
            "servers": {"plain": plain.url, "ngram": url},
            "classes": {"code": "ngram"},
            "default": "plain",
        }
    )
    headers = {"x-adaptspec-class": "code"}
    status, told, body = router.ask(b'{"a": 1}', headers=headers)
    assert (status, body) == (200, b'{"a": 1}')
    assert told["x-adaptspec-server"] == "plain"
    assert told["x-adaptspec-class"] == "code"


def test_another_url_of_the_same_server_is_asked_first(world: World) -> None:
    other, second = world.server(), world.server()
    router = world.router(
        {
            "servers": {"other": other.url, "a": [nobody(), second.url]},
            "default": "a",
        }
    )
    for _ in range(4):
        assert router.ask(b"{}")[1]["x-adaptspec-server"] == "a"
    assert (len(second.received), len(other.received)) == (4, 0)


@pytest.mark.parametrize("fallback", [True, False])
@pytest.mark.parametrize(
    ("answer", "status", "code", "told"),
    [
        (None, 503, "server_down", "is down"),
        (breaks_off, 502, "server_broke_off", "closed the connection"),
    ],
)
def test_where_no_server_answers_the_error_has_openais_shape(
    world: World, fallback: bool, answer: Any, status: int, code: str, told: str
) -> None:
    url = nobody() if answer is None else world.server(answer).url
    up = world.server()
    servers = {"a": url, "b": nobody() if fallback else up.url}
    router = world.router(table(servers, fallback=fallback))
    got, headers, body = router.ask(messages("secret"))
    error = error_of(body)
    assert (got, error["code"], error["type"]) == (status, code, "server_error")
    assert f"{url} {told}" in error["message"]
    assert "secret" not in error["message"]
    assert headers["x-adaptspec-server"] == "a"
    assert up.received == []


def test_a_request_that_ends_a_server_is_asked_of_no_other(world: World) -> None:
    one, two, plain = (world.server(breaks_off) for _ in range(3))
    router = world.router(
        {
            "servers": {"a": [one.url, two.url], "plain": plain.url},
            "default": "plain",
            "classes": {"code": "a"},
        }
    )
    headers = {"x-adaptspec-class": "code"}
    status, _, body = router.ask(b"{}", headers=headers)
    assert status == 502
    assert error_of(body)["code"] == "server_broke_off"
    assert len([*one.received, *two.received, *plain.received]) == 1


def test_a_server_that_is_unavailable_is_heard_where_no_other_may_answer(
    world: World,
) -> None:
    router = world.router(table({"a": world.server(loading).url}))
    status, _, body = router.ask(b"{}")
    assert status == 503
    assert json.loads(body)["error"]["message"] == "Loading model"


def test_a_slow_server_is_waited_for(world: World) -> None:
    """Only connecting has a time-out, which is far shorter here than the wait."""

    async def answer(request: Received, to: Conversation) -> None:
        await asyncio.sleep(0.5)
        await to.start()
        await asyncio.sleep(0.5)
        await to.piece(b"late")
        await to.end()

    server = world.server(answer)
    router = world.router(table({"a": server.url}), connect_timeout=0.2)
    assert router.ask(b"{}")[2] == b"late"


def test_health_says_which_server_is_well(world: World) -> None:
    well, down = world.server(), nobody()
    router = world.router(table({"a": well.url, "b": [down, well.url], "c": down}))
    status, _, body = router.ask(b"", "/health", method="GET")
    assert status == 200
    assert json.loads(body) == {
        "status": "degraded",
        "servers": {
            "a": {well.url: True},
            "b": {down: False, well.url: True},
            "c": {down: False},
        },
    }
    assert well.received[-1].target == "/health"
    router = world.router(table({"c": down}))
    status, _, body = router.ask(b"", "/health", method="GET")
    assert (status, json.loads(body)["status"]) == (503, "down")
    router = world.router(table({"a": well.url}))
    assert b'"ok"' in router.ask(b"", "/health", method="GET")[2]


def test_answers_are_counted_by_class_server_and_status(world: World) -> None:
    server = world.server()
    router = world.router(table({"a": server.url}, classes={"code": "a"}))
    for _ in range(3):
        router.ask(b"{}", headers={"x-adaptspec-class": "code"})
    router.ask(b"{}")
    lines = router.ask(b"", "/metrics", method="GET")[2].decode().splitlines()
    start = "adaptspec_router_answers_total"
    assert f'{start}{{prompt_class="code",server="a",status="200"}} 3.0' in lines
    assert f'{start}{{prompt_class="",server="a",status="200"}} 1.0' in lines
    assert "adaptspec_router_open_requests 0.0" in lines


def test_nothing_of_a_text_is_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    router = world.router(
        table({"a": world.server(breaks_off).url}, classifier=by_hand().as_json())
    )
    router.ask(messages("top secret"))
    router.ask(b'{"prompt": top secret}', TEXT)
    router.ask(messages("top secret"), headers={"x-adaptspec-class": "none"})
    assert caplog.records
    assert "secret" not in caplog.text
