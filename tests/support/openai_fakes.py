"""A server of OpenAI's API in this process, whose answers and faults a test decides.

It speaks HTTP by itself, so that a stream can break off anywhere and connections can be
counted.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HELD = 30.0  # seconds that a held stream waits at most


@dataclass
class FakeServer:
    """What a server does; set before it is asked.

    Args:
        words: Of every answer, one token each.
        ids: Their token ids, where it tells them.
        usage: Whether it counts tokens where it is asked to.
        unknown: Fields that it refuses.
        most: Tokens after which it cuts an answer.
        breaks_after: Chunks after which it closes the connection.
        fails_after: Chunks after which it sends an error in the stream.
        held: Prompts (by their text) whose streams wait after the first chunk.
        busy: Statuses of the first answers, each with its ``Retry-After``.
        refusals: Prompt's text -> status and body of its refusal.
        pages: Path -> JSON, or text, that a GET or POST gets; or status and JSON; or
            what makes one of them of the request's body.
        key: That it wants.
        template: Whether it can render chats.
        steps: Tokens in each chunk but the first, which has one.
        answered: Called with the tokens and chunks of an answer, when it was sent.
    """

    words: Sequence[str] = ("blue", " is", " a", " colour")
    ids: Sequence[int] | None = None
    usage: bool = True
    unknown: Sequence[str] = ()
    most: int | None = None
    breaks_after: int | None = None
    fails_after: int | None = None
    held: Sequence[str] = ()
    busy: list[tuple[int, str | None]] = field(default_factory=list)
    refusals: Mapping[str, tuple[int, Any]] = field(default_factory=dict)
    pages: dict[str, Any] = field(default_factory=dict)
    cached: int | None = None
    key: str | None = None
    template: bool = True
    steps: int = 1
    url: str = ""
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    answered: Callable[[int, int], None] = lambda tokens, chunks: None
    open: int = 0
    most_open: int = 0
    opened: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)
    released: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.pages.setdefault(
            "/v1/models", {"data": [{"id": "the-model", "owned_by": "someone"}]}
        )

    def wait_until(self, holds: Callable[[], bool]) -> bool:
        """Whether ``holds`` became true as connections came and went."""
        with self.changed:
            return self.changed.wait_for(holds, timeout=HELD)

    def count(self, by: int) -> None:
        with self.changed:
            self.open += by
            self.opened += max(by, 0)
            self.most_open = max(self.most_open, self.open)
            self.changed.notify_all()


@contextlib.contextmanager
def running(fake: FakeServer, port: int = 0) -> Iterator[FakeServer]:
    """``fake`` at a port, 0: a free one; ended with all its connections."""

    class Handler(_Handler):
        told = fake

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        fake.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    told: FakeServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "Fake/1.2", ""

    def setup(self) -> None:
        super().setup()
        self.told.count(1)

    def finish(self) -> None:
        self.told.count(-1)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._page(self.path)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.told.bodies.append((self.path, body))
        if self.path.endswith("/completions") and body.get("stream"):
            self._answer(body)
        else:
            self._page(self.path, body)

    def _page(self, path: str, body: Any = None) -> None:
        if self.told.key and self.headers.get("Authorization") != (
            f"Bearer {self.told.key}"
        ):
            sent = self.headers.get("Authorization", "")
            self._send(401, {"error": {"message": f"Incorrect API key: {sent}"}})
            return
        page = self.told.pages.get(path)
        if callable(page):
            page = page(body)
        if page is None:
            self._send(404, {"detail": "Not Found"})
        elif isinstance(page, tuple):
            self._send(*page)
        else:
            self._send(200, page)

    def _send(self, status: int, page: Any, retry_after: str | None = None) -> None:
        plain = isinstance(page, str)
        data = (page if plain else json.dumps(page)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if plain else "application/json")
        self.send_header("Content-Length", str(len(data)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, body: Mapping[str, Any]) -> None:
        told, prompt = self.told, _prompt(body)
        for name in told.unknown:
            if name in body:
                words = f"Unsupported parameter: {name!r} is not supported"
                if name == "max_tokens":
                    words += ". Use 'max_completion_tokens' instead."
                self._send(400, {"error": {"message": words}})
                return
        if "messages" in body and not told.template:
            self._send(400, {"error": {"message": "There is no Chat Template"}})
            return
        with told.changed:
            busy = told.busy.pop(0) if told.busy else None
        if busy is not None:
            self._send(busy[0], {"error": {"message": "slow down"}}, busy[1])
            return
        if prompt in told.refusals:
            self._send(*told.refusals[prompt])
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):
            self._stream(body, prompt)

    def _stream(self, body: Mapping[str, Any], prompt: str) -> None:
        told, chat = self.told, "messages" in body
        limit = body.get("max_tokens") or body.get("max_completion_tokens")
        count = min(len(told.words), limit or len(told.words))
        cut = told.most is not None and told.most < count
        count = min(count, told.most or count)
        if chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        starts = [0, *range(1, count, told.steps)]
        ends = [*starts[1:], count]
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if told.breaks_after == number:
                self.close_connection = True
                self.connection.close()
                return
            if told.fails_after == number:
                self._event({"error": {"message": "the engine is dead", "code": 500}})
                break
            text = "".join(told.words[start:end])
            choice: dict[str, Any] = (
                {"delta": {"content": text}} if chat else {"text": text}
            )
            if told.ids is not None and body.get("return_token_ids"):
                choice["token_ids"] = list(told.ids[start:end])
            ended = "length" if cut else "stop"
            choice["finish_reason"] = ended if end == count else None
            self._event({"choices": [choice]})
            if number == 0 and prompt in told.held:
                told.released.wait(HELD)
        told.answered(count, len(starts))
        if told.usage and (body.get("stream_options") or {}).get("include_usage"):
            usage: dict[str, Any] = {"prompt_tokens": 7, "completion_tokens": count}
            if told.cached is not None:
                usage["prompt_tokens_details"] = {"cached_tokens": told.cached}
            self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, data: Mapping[str, Any]) -> None:
        self._chunk(f": a comment\ndata: {json.dumps(data)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def _prompt(body: Mapping[str, Any]) -> str:
    if "messages" in body:
        return str(body["messages"][-1]["content"])
    return str(body["prompt"])
