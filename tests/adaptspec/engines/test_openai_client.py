"""A client against a server whose answers and faults are known."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.engines.openai_client import (
    CompletionRequest,
    OpenAIClient,
    RefusedError,
    addresses,
    is_loopback,
)
from adaptspec.errors import EngineError
from openai_fakes import FakeServer, running


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with running(FakeServer()) as server:
        yield server


@pytest.fixture
def client(fake: FakeServer) -> Iterator[OpenAIClient]:
    with OpenAIClient(fake.url) as opened:
        yield opened


def chat(text: str = "Hello", **more: Any) -> CompletionRequest:
    messages = [{"role": "user", "content": text}]
    body = {"model": "the-model", "messages": messages, "max_tokens": 4, **more}
    return CompletionRequest("chat/completions", body)


def text(prompt: str = "Hello", **more: Any) -> CompletionRequest:
    body = {"model": "the-model", "prompt": prompt, "max_tokens": 4, **more}
    return CompletionRequest("completions", body)


@pytest.mark.parametrize("request_", [chat(), text()])
def test_an_answer_is_put_together_from_its_stream(
    fake: FakeServer, client: OpenAIClient, request_: CompletionRequest
) -> None:
    (reply,) = client.ask([request_])
    assert reply.text == "blue is a colour"
    assert (reply.tokens, reply.counted, reply.chunks) == (4, False, 4)
    assert reply.finish_reason == "stop"
    assert reply.token_ids is None
    assert (reply.prompt_tokens, reply.cached_tokens) == (7, None)
    path, body = fake.bodies[-1]
    assert path == f"/v1/{request_.endpoint}"
    assert body["stream"] is True


def test_ids_and_cached_tokens_are_told_where_the_server_tells() -> None:
    fake = FakeServer(ids=(5, 6, 7, 8), steps=3, cached=6)
    with running(fake), OpenAIClient(fake.url) as client:
        (reply,) = client.ask([text(return_token_ids=True)])
    assert reply.token_ids == (5, 6, 7, 8)
    assert (reply.tokens, reply.chunks, reply.cached_tokens) == (4, 2, 6)


def test_chunks_are_counted_where_the_server_counts_no_tokens() -> None:
    fake = FakeServer(usage=False, steps=3)
    with running(fake), OpenAIClient(fake.url) as client:
        (reply,) = client.ask([chat()])
    assert (reply.tokens, reply.counted) == (2, True)


@pytest.mark.parametrize(
    ("unknown", "kept"),
    [
        ("stream_options", {"max_tokens": 4, "return_token_ids": True}),
        ("return_token_ids", {"max_tokens": 4}),
        ("max_tokens", {"max_completion_tokens": 4, "return_token_ids": True}),
    ],
)
def test_a_field_that_the_server_refuses_is_left_out_from_then_on(
    unknown: str, kept: dict[str, Any]
) -> None:
    fake = FakeServer(unknown=[unknown])
    with running(fake), OpenAIClient(fake.url) as client:
        for _ in range(2):
            (reply,) = client.ask([chat(return_token_ids=True)])
            assert reply.text == "blue is a colour"
    refused, *later = [body for _, body in fake.bodies]
    assert unknown in refused
    assert len(later) == 2
    for body in later:
        assert unknown not in body
        assert kept.items() <= body.items()


def test_times_are_from_the_request_to_the_first_and_last_token() -> None:
    """By a clock that each look advances: the order of looks is the order of events."""
    ticks = iter(range(1000))
    fake = FakeServer()
    with running(fake), OpenAIClient(fake.url, clock=lambda: next(ticks)) as client:
        (reply,) = client.ask([text()])
    # One look at the start, then one at each chunk: four of tokens, one of usage.
    assert (reply.seconds_to_first, reply.seconds) == (1, 4)


def test_the_role_that_opens_a_chat_is_no_token() -> None:
    ticks = iter(range(1000))
    fake = FakeServer()
    with running(fake), OpenAIClient(fake.url, clock=lambda: next(ticks)) as client:
        (reply,) = client.ask([chat()])
    assert (reply.seconds_to_first, reply.seconds) == (2, 5)


def test_several_requests_are_answered_at_the_same_time_and_in_order() -> None:
    """Each stream waits until all have begun; asked in turn, none would end."""
    names = [f"prompt {i}" for i in range(5)]
    fake = FakeServer(held=names)
    with running(fake), OpenAIClient(fake.url) as client:

        def release() -> None:
            if fake.wait_until(lambda: fake.open == 5):
                fake.released.set()

        threading.Thread(target=release).start()
        replies = client.ask([text(n, max_tokens=i + 1) for i, n in enumerate(names)])
    assert [reply.tokens for reply in replies] == [1, 2, 3, 4, 4]
    assert fake.most_open == 5


def test_a_connection_serves_again(fake: FakeServer, client: OpenAIClient) -> None:
    for _ in range(3):
        client.ask([text()])
    assert fake.opened == 1


def test_where_one_request_fails_the_others_are_given_up_and_closed() -> None:
    fake = FakeServer(
        held=["slow", "slower"],
        refusals={"bad": (400, {"error": {"message": "too long\nby far"}})},
    )
    with running(fake), OpenAIClient(fake.url) as client:
        with pytest.raises(RefusedError, match="status 400: too long by far"):
            client.ask([text("slow"), text("bad"), text("slower")])
        fake.released.set()  # the server writes on, and sees that nobody reads
        assert fake.wait_until(lambda: fake.open <= 1)  # the refused one may be kept


def waited(
    fake: FakeServer, requests: int = 1, patience: int = 3, **options: Any
) -> tuple[list[float], list[Any]]:
    """Seconds that the client waited, and the replies; it waits without waiting."""
    seconds: list[float] = []

    async def sleep(wanted: float) -> None:
        seconds.append(wanted)

    with (
        running(fake),
        OpenAIClient(fake.url, patience=patience, sleep=sleep, **options) as client,
    ):
        return seconds, client.ask([text()] * requests)


@pytest.mark.parametrize(
    ("busy", "seconds"),
    [
        ([], []),
        ([(429, None), (503, None), (429, None)], [1, 2, 4]),
        ([(429, "7"), (429, None)], [7, 2]),
        ([(503, "Wed, 21 Oct 2015 07:28:00 GMT"), (503, "soon")], [0, 2]),
    ],
)
def test_a_busy_server_is_asked_again_after_a_while(
    busy: list[tuple[int, str | None]], seconds: list[float]
) -> None:
    fake = FakeServer(busy=list(busy))
    found, (reply,) = waited(fake)
    assert found == seconds
    assert reply.tokens == 4


def test_all_requests_are_sent_again_and_none_is_timed_while_it_waits() -> None:
    ticks = iter(range(1000))
    fake = FakeServer(busy=[(429, None)])
    _, (reply,) = waited(fake, clock=lambda: next(ticks))
    assert (reply.seconds_to_first, reply.seconds) == (1, 4)
    fake = FakeServer(busy=[(429, None)])
    seconds, replies = waited(fake, requests=3)
    assert len(replies) == 3
    assert len(fake.bodies) >= 3 + 1
    assert seconds == [1]


@pytest.mark.parametrize(
    ("busy", "patience", "words"),
    [
        ([(429, None)] * 4, 3, "slow down; also after 7 s of waiting; lower --conc"),
        ([(429, "3600")], 3, "slow down; it asks to wait 3600 s; lower --concurrency"),
        ([(503, None)], 0, "status 503: slow down$"),
        ([(500, None)], 3, "status 500: slow down$"),
    ],
)
def test_a_server_that_stays_busy_is_an_error(
    busy: list[tuple[int, str | None]], patience: int, words: str
) -> None:
    fake = FakeServer(busy=list(busy))
    with pytest.raises(RefusedError, match=words):
        waited(fake, patience=patience)
    assert not fake.busy


def test_closing_leaves_no_connection(fake: FakeServer) -> None:
    client = OpenAIClient(fake.url)
    client.ask([text(), chat()])
    client.close()
    client.close()
    assert fake.wait_until(lambda: fake.open == 0)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_stream_that_breaks_off_is_an_error(count: int) -> None:
    fake = FakeServer(breaks_after=count)
    with running(fake), OpenAIClient(fake.url) as client:
        with pytest.raises(EngineError) as raised:
            client.ask([text()])
    words = f"broke off after {count} chunks" if count else "the connection failed"
    assert words in str(raised.value)


def test_an_error_within_the_stream_is_the_servers() -> None:
    fake = FakeServer(fails_after=2)
    with running(fake), OpenAIClient(fake.url) as client:
        with pytest.raises(RefusedError, match="after 2 chunks: the engine is dead"):
            client.ask([text()])


@pytest.mark.parametrize(
    ("status", "page", "words"),
    [
        (400, {"error": {"message": "no chat template"}}, "400: no chat template"),
        (400, {"object": "error", "message": "at most 5"}, "400: at most 5"),
        (422, {"detail": [{"msg": "field required"}]}, "422: field required"),
        (404, {"error": {"message": "no model x"}}, "no model x; check the address"),
        (403, {"error": "no"}, "no; give a key that it takes by --api-key"),
        (500, "<html>\n  oh  dear</html>", "500: <html> oh dear</html>"),
        (503, "", "503: Service Unavailable"),
    ],
)
def test_a_refusal_is_one_line_with_the_servers_words(
    status: int, page: Any, words: str
) -> None:
    fake = FakeServer(refusals={"Hello": (status, page)})
    with running(fake), OpenAIClient(fake.url) as client:
        with pytest.raises(RefusedError) as raised:
            client.ask([text()])
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.status == status


def test_the_key_is_sent_and_never_shown() -> None:
    fake = FakeServer(key="right-key")
    with running(fake):
        with OpenAIClient(fake.url, "right-key") as client:
            assert client.get("models")["data"][0]["id"] == "the-model"
        for key in ("wrong-key", None):
            with OpenAIClient(fake.url, key) as client:
                with pytest.raises(RefusedError, match="401") as raised:
                    client.get("models")
            assert "OPENAI_API_KEY" in str(raised.value)
            assert "wrong-key" not in str(raised.value)


def test_no_server_is_an_error_with_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # it doesn't listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with OpenAIClient(url) as client:
            with pytest.raises(EngineError, match="no server answers there"):
                client.get("models")
            with pytest.raises(EngineError, match="start it, or check the address"):
                client.ask([text()])


@pytest.mark.slow
def test_a_silent_server_is_an_error() -> None:
    fake = FakeServer(held=["Hello"])
    with running(fake), OpenAIClient(fake.url, timeout=0.3) as client:
        with pytest.raises(EngineError, match=r"said nothing for 0\.3 s"):
            client.ask([text()])


def test_another_kind_of_server_is_told_from_one_of_this_kind() -> None:
    fake = FakeServer(pages={"/v1/models": "<html>Welcome</html>"})
    with running(fake), OpenAIClient(fake.url) as client:
        with pytest.raises(EngineError, match="got text/plain; check the address"):
            client.get("models")


def test_an_answer_that_is_not_streamed_is_an_error() -> None:
    fake = FakeServer(refusals={"Hello": (200, {"choices": []})})
    with running(fake), OpenAIClient(fake.url) as client:
        with pytest.raises(EngineError, match="text/event-stream, got application"):
            client.ask([text()])


@pytest.mark.parametrize(
    ("url", "base", "root"),
    [
        ("http://host:8000", "http://host:8000/v1", "http://host:8000"),
        ("http://host:8000/", "http://host:8000/v1", "http://host:8000"),
        ("http://host:8000/v1", "http://host:8000/v1", "http://host:8000"),
        ("https://host/v1/", "https://host/v1", "https://host"),
        ("https://host/a/v1beta/openai/", *["https://host/a/v1beta/openai"] * 2),
        ("http://[::1]:80/x/v1", "http://[::1]:80/x/v1", "http://[::1]:80/x"),
    ],
)
def test_endpoints_are_under_the_path_given_or_v1(
    url: str, base: str, root: str
) -> None:
    if "[::1]:80" in url:  # the default port may be left out
        assert [a.replace(":80/", "/") for a in addresses(url)] == [
            base.replace(":80/", "/"),
            root.replace(":80/", "/"),
        ]
    else:
        assert addresses(url) == (base, root)


@pytest.mark.parametrize(
    "url",
    ["", "host:8000", "ftp://host", "http://", "http://h/v1?x=1", "http://me:pw@h"],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(EngineError, match="address"):
        addresses(url)


Kind = Literal["content", "reasoning_content", "reasoning"]


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(
            st.sampled_from(("content", "reasoning_content", "reasoning")),
            st.text(min_size=1, max_size=6),
        ),
        max_size=6,
    )
)
def test_all_that_a_chat_brings_is_kept_in_order(parts: list[tuple[Kind, str]]) -> None:
    from adaptspec.engines.openai_client import _Parts

    stream = _Parts()
    for number, (kind, words) in enumerate(parts):
        chunk = json.loads(json.dumps({"choices": [{"delta": {kind: words}}]}))
        stream.add(chunk, float(number))
    reply = stream.reply()
    assert reply.text == "".join(words for _, words in parts)
    assert reply.tokens == len(parts)
    assert reply.seconds == max(0, len(parts) - 1)


def test_no_proxy_stands_before_this_machine(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with OpenAIClient(fake.url) as client:
        assert client.ask([chat()])[0].tokens == 4


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("127.0.0.1:8000", True),
        ("127.1.2.3", True),
        ("[::1]:80", True),
        ("localhost:1", True),
        ("LOCALHOST", True),
        ("model.localhost", True),
        ("128.0.0.1", False),
        ("localhost.example.org", False),
        ("gpu-box:8000", False),
    ],
)
def test_loopback_is_told_from_other_machines(host: str, told: bool) -> None:
    assert is_loopback(f"http://{host}/v1") is told
