"""OpenAI's own client talks to the router as it talks to a server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from upstreams import Conversation, Received, World, skip_without_packages

skip_without_packages()

openai: Any = pytest.importorskip("openai", reason="needs `pip install openai`")

WORDS = ["Grüße", ", ", "世界", " 😀", "!"]


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    value = {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "tiny",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


async def serves(request: Received, to: Conversation) -> None:
    """Answers chats, streamed or whole, text completions, and the list of models."""
    if request.target == "/v1/models":
        models = {"object": "list", "data": [{"id": "tiny", "object": "model"}]}
        await to.whole(
            json.dumps(models).encode(), "200 OK", "Content-Type: application/json"
        )
        return
    asked = json.loads(request.body)
    if asked.get("max_tokens") == 0:
        error = {"message": "max_tokens must be positive", "type": "invalid_request"}
        await to.whole(
            json.dumps({"error": error}).encode(),
            "422 Unprocessable Entity",
            "Content-Type: application/json",
        )
        return
    if asked.get("stream"):
        await to.start("200 OK", "Content-Type: text/event-stream")
        for word in WORDS:
            data = chunk({"content": word})
            await to.piece(data[:17])  # pieces end anywhere, also within a character
            await to.piece(data[17:])
        await to.piece(chunk({}, "stop") + b"data: [DONE]\n\n")
        await to.end()
        return
    text = "".join(WORDS)
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    if request.target == "/v1/completions":
        choice["text"] = text
    else:
        choice["message"] = {"role": "assistant", "content": text}
    whole = {"id": "c1", "created": 1, "model": "tiny", "choices": [choice]}
    body = json.dumps(whole, ensure_ascii=False).encode()
    await to.whole(body, "200 OK", "Content-Type: application/json")


@pytest.fixture
def client(world: World) -> Any:
    router = world.router(
        {
            "servers": {"a": world.server(serves).url},
            "classes": {"code": "a"},
            "default": "a",
        }
    )
    with openai.OpenAI(
        base_url=f"{router.url}/v1", api_key="key", max_retries=0
    ) as client:
        yield client


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


def test_a_chat_streams_through(client: Any) -> None:
    with client.chat.completions.create(**CHAT, stream=True) as stream:
        words = [part.choices[0].delta.content for part in stream]
    assert words == [*WORDS, None]


def test_chats_and_texts_come_whole(client: Any) -> None:
    chat = client.chat.completions.create(
        **CHAT, extra_headers={"x-adaptspec-class": "code"}
    )
    assert chat.choices[0].message.content == "".join(WORDS)
    text = client.completions.create(model="tiny", prompt="Hello")
    assert text.choices[0].text == "".join(WORDS)


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_how_a_request_was_routed_can_be_read(client: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(
        **CHAT, extra_headers={"x-adaptspec-class": "code"}
    )
    assert raw.headers["x-adaptspec-class"] == "code"
    assert raw.headers["x-adaptspec-server"] == "a"


def test_errors_of_the_server_and_of_the_router_are_the_clients_own(
    client: Any,
) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="must be positive"):
        client.chat.completions.create(**CHAT, max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="no class 'chat'") as refused:
        client.chat.completions.create(
            **CHAT, extra_headers={"x-adaptspec-class": "chat"}
        )
    assert refused.value.code == "unknown_class"


def test_a_stream_that_is_left_is_left_at_the_server(client: Any, world: World) -> None:
    for _ in range(5):
        with client.chat.completions.create(**CHAT, stream=True) as stream:
            next(iter(stream))
    assert client.chat.completions.create(**CHAT).choices
