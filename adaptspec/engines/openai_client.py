"""A client of OpenAI-compatible servers that times answers as the asker sees them."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Literal, TypeVar

import httpx2
from anyio.from_thread import start_blocking_portal

from adaptspec.errors import EngineError

T = TypeVar("T")

# What not every server takes; a server that refuses one is asked again without it.
DROPPED = ("stream_options", "return_token_ids")
LONGEST_MESSAGE = 400
BUSY = (429, 503)  # statuses of HTTP
LONGEST_PAUSE = 60.0  # seconds that a busy server may ask for


class RefusedError(EngineError):
    """The server answered with an error.

    Attributes:
        status: Of HTTP; 0 where the error came within a stream.
        message: The server's own words.
        retry_after: Seconds after which it wants to be asked again, where it tells.
    """

    def __init__(
        self,
        text: str,
        status: int,
        message: str,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(text)
        self.status = status
        self.message = message
        self.retry_after = retry_after


@dataclass(frozen=True)
class CompletionRequest:
    """What is asked for; that it is streamed, the client adds.

    Args:
        endpoint: Of a chat, or of a text or token ids that are continued.
        body: As OpenAI's reference has it: ``model``, ``messages`` or ``prompt``...
    """

    endpoint: Literal["chat/completions", "completions"]
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """One answer, with its times as the client sees them.

    Args:
        text: All that was generated: reasoning and tool calls too, as they came.
        token_ids: Its tokens, where the server sends them.
        tokens: How many they are: by the server's ``usage``, else by the chunks.
        counted: Whether ``tokens`` are the chunks of the stream, since the server
            doesn't count; a chunk may hold several tokens.
        chunks: Parts of the stream that held tokens.
        seconds: From sending the request to the last token.
        seconds_to_first: From sending the request to the first token.
        prompt_tokens: None where the server doesn't tell.
        cached_tokens: Of the prompt, read from a cache of earlier requests; None where
            the server doesn't tell.
        finish_reason: ``stop``, ``length``...
    """

    text: str
    token_ids: tuple[int, ...] | None
    tokens: int
    counted: bool
    chunks: int
    seconds: float
    seconds_to_first: float
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None


class OpenAIClient:
    """A connection to one server; several requests may be answered at a time.

    Args:
        url: ``http://host:8000``, or with the path that its endpoints are under
            (``/v1`` where there is none).
        api_key: None: no key is sent.
        timeout: Longest silence of the server in seconds, also before the first token.
        patience: How often requests are sent again, all of them, where the server
            refuses one because it is busy (status 429 or 503).
        clock: Seconds.
        sleep: Waits for seconds.

    Raises:
        EngineError: from any method, in one line: no server there, a key or a model
            that it doesn't take, a request that it refuses (with its own words), a
            silence, a stream that breaks off.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float = 600.0,
        patience: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.base, self.root = addresses(url)
        self._key = api_key
        self._clock = clock
        self._timeout = timeout
        self._patience = patience
        self._sleep = sleep
        self._refused: set[str] = set()
        self._closing = ExitStack()
        self._portal = self._closing.enter_context(start_blocking_portal())
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Made where it is used: connections belong to the portal's event loop.
        self._http = self._portal.call(
            lambda: httpx2.AsyncClient(
                headers=headers,
                timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
                limits=httpx2.Limits(),  # as many connections as requests at a time
                trust_env=not is_loopback(self.base),  # no proxy stands before it
            )
        )

    def ask(self, requests: Sequence[CompletionRequest]) -> list[Reply]:
        """Send all at the same time; where one fails, the others are given up.

        Returns:
            The replies, in the order of ``requests``.
        """
        return self._run(lambda: self._ask_patiently(requests))

    def post(self, path: str, body: Mapping[str, Any], root: bool = False) -> Any:
        """The JSON that the server answers with, not streamed.

        Args:
            path: Below the address of the endpoints.
            root: ``path`` is below the server's own address.

        Raises:
            RefusedError: if it answers with an error.
        """
        return self._run(lambda: self._send("POST", self._url(path, root), body))

    def get(self, path: str, root: bool = False) -> Any:
        """The same of a GET request."""
        return self._run(lambda: self._send("GET", self._url(path, root)))

    def text(self, path: str) -> str:
        """What is at ``path`` below the server's own address."""
        return self._run(lambda: self._fetch("GET", self._url(path, True))).text

    def header(self, path: str, name: str) -> str | None:
        """A header of the answer to a GET request; None where it has none."""
        found = self._run(lambda: self._fetch("GET", self._url(path, False)))
        value = found.headers.get(name)
        return str(value) if value else None

    def close(self) -> None:
        """Close all connections; again is allowed."""
        if not self._http.is_closed:
            self._portal.call(self._http.aclose)
            self._closing.close()

    def __enter__(self) -> OpenAIClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _url(self, path: str, root: bool) -> str:
        return f"{self.root if root else self.base}/{path.lstrip('/')}"

    def _run(self, function: Callable[[], Awaitable[T]]) -> T:
        future = self._portal.start_task_soon(function)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C came here; what runs there closes its connections
            raise

    async def _ask_patiently(
        self, requests: Sequence[CompletionRequest]
    ) -> list[Reply]:
        """No answer's time holds what is waited here: each begins with its request."""
        pause, waited, left = 1.0, 0.0, self._patience
        while True:
            try:
                return await self._ask_all(requests)
            except RefusedError as error:
                if error.status not in BUSY or not self._patience:
                    raise
                wanted = pause if error.retry_after is None else error.retry_after
                if not left or wanted > LONGEST_PAUSE:
                    why = (
                        f"it asks to wait {wanted:.0f} s"
                        if left
                        else f"also after {waited:.0f} s of waiting"
                    )
                    raise RefusedError(
                        f"{error}; {why}; lower --concurrency, or try again later",
                        error.status,
                        error.message,
                    ) from None
            await self._sleep(wanted)
            pause, waited, left = 2 * pause, waited + wanted, left - 1

    async def _ask_all(self, requests: Sequence[CompletionRequest]) -> list[Reply]:
        asked = [asyncio.ensure_future(self._ask(request)) for request in requests]
        try:
            return list(await asyncio.gather(*asked))
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _ask(self, request: CompletionRequest) -> Reply:
        while True:
            body = self._body(request)
            try:
                return await self._stream(self._url(request.endpoint, False), body)
            except RefusedError as error:
                if error.status not in (400, 422):
                    raise
                names = {name for name in self._unknown(error.message) if name in body}
                if not names:
                    raise
                self._refused |= names

    def _body(self, request: CompletionRequest) -> dict[str, Any]:
        body = {
            **request.body,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for name in self._refused:
            value = body.pop(name, None)
            if name == "max_tokens" and value is not None:
                body["max_completion_tokens"] = value
        return body

    @staticmethod
    def _unknown(message: str) -> set[str]:
        """Fields that the server says it doesn't take."""
        names = {name for name in DROPPED if name in message}
        if "max_completion_tokens" in message and "instead" in message:
            names.add("max_tokens")
        return names

    async def _stream(self, url: str, body: Mapping[str, Any]) -> Reply:
        parts = _Parts()
        start = self._clock()
        try:
            async with self._http.stream("POST", url, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise self._refusal(response)
                self._check_type(response, "text/event-stream")
                async for event in httpx2.EventSource(response):
                    # Read to its end all the same, so that the connection serves again.
                    if event.data.strip() != "[DONE]":
                        self._add(parts, event.data, url, self._clock() - start)
        except httpx2.HTTPError as error:
            raise self._failure(error, url, parts) from None
        if parts.finish_reason is None:
            raise EngineError(
                f"{url}: the stream broke off after {parts.chunks} chunks, without a "
                "finish_reason; see the server's log"
            )
        return parts.reply()

    def _add(self, parts: _Parts, data: str, url: str, seconds: float) -> None:
        try:
            chunk = json.loads(data)
        except json.JSONDecodeError:
            raise EngineError(
                f"{url}: a chunk of the stream isn't JSON: {_line(data)!r}"
            ) from None
        if not isinstance(chunk, dict):
            raise EngineError(f"{url}: a chunk of the stream isn't an object: {data!r}")
        if chunk.get("error"):
            message = self._hidden(_message_of(chunk))
            raise RefusedError(
                f"{url}: the server gave up after {parts.chunks} chunks: {message}",
                0,
                message,
            )
        parts.add(chunk, seconds)

    async def _fetch(
        self, method: str, url: str, body: Mapping[str, Any] | None = None
    ) -> httpx2.Response:
        try:
            response = await self._http.request(method, url, json=body)
        except httpx2.HTTPError as error:
            raise self._failure(error, url, None) from None
        if response.status_code != 200:
            raise self._refusal(response)
        return response

    async def _send(
        self, method: str, url: str, body: Mapping[str, Any] | None = None
    ) -> Any:
        response = await self._fetch(method, url, body)
        self._check_type(response, "application/json")
        try:
            return response.json()
        except ValueError:
            raise EngineError(f"{url}: the answer isn't JSON") from None

    def _check_type(self, response: httpx2.Response, wanted: str) -> None:
        found = response.headers.get("content-type", "").partition(";")[0].strip()
        if found.lower() != wanted:
            raise EngineError(
                f"{response.url}: an OpenAI-compatible server answers with {wanted}, "
                f"got {found or 'no content type'}; check the address"
            )

    def _refusal(self, response: httpx2.Response) -> RefusedError:
        status = response.status_code
        try:
            message = _message_of(response.json())
        except ValueError:
            message = response.text
        message = self._hidden(message) or response.reason_phrase
        way_out = ""
        if status in (401, 403):
            way_out = "; give a key that it takes by --api-key or OPENAI_API_KEY"
        elif status == 404:
            way_out = "; check the address, and the name given by --model"
        elif response.has_redirect_location:
            way_out = f"; it points to {response.headers['location']}"
        text = f"{response.url}: the server refused with status {status}: {message}"
        retry_after = _seconds_until(response.headers.get("retry-after"))
        return RefusedError(text + way_out, status, message, retry_after)

    def _failure(
        self, error: httpx2.HTTPError, url: str, parts: _Parts | None
    ) -> EngineError:
        why = self._hidden(str(error)) or type(error).__name__
        if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
            return EngineError(
                f"{url}: no server answers there ({why}); start it, or check the "
                "address"
            )
        if isinstance(error, httpx2.TimeoutException):
            return EngineError(
                f"{url}: the server said nothing for {self._timeout:g} s; see its log"
            )
        if parts is not None and parts.chunks:
            return EngineError(
                f"{url}: the stream broke off after {parts.chunks} chunks ({why}); "
                "see the server's log"
            )
        return EngineError(
            f"{url}: the connection failed ({why}); see the server's log"
        )

    def _hidden(self, text: str) -> str:
        """In one line, and without the key, which servers repeat."""
        return _line(text.replace(self._key, "***") if self._key else text)


def addresses(url: str) -> tuple[str, str]:
    """Where the endpoints are, and the server's own address; no slash ends them.

    Raises:
        EngineError: if it isn't an address of HTTP.
    """
    try:
        read = httpx2.URL(url.strip())
    except httpx2.InvalidURL as error:
        raise EngineError(f"{url!r} isn't an address: {error}") from None
    if read.scheme not in ("http", "https") or not read.host:
        raise EngineError(
            f"an address of a server is http://HOST:PORT or https://HOST, got {url!r}"
        )
    if read.query or read.fragment:
        raise EngineError(f"an address of a server ends with its path, got {url!r}")
    if read.userinfo:
        raise EngineError(
            "an address of a server has no name and password before the host; give a "
            "key by --api-key or OPENAI_API_KEY"
        )
    plain = str(read).rstrip("/")
    if read.path.strip("/"):
        return plain, plain.removesuffix("/v1")
    return f"{plain}/v1", plain


def is_loopback(url: str) -> bool:
    """Whether an address is of this machine alone."""
    host = httpx2.URL(url).host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@dataclass
class _Parts:
    """What a stream has brought so far."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tells_ids: bool = False
    chunks: int = 0
    first: float | None = None
    last: float = 0.0
    usage: Mapping[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None

    def add(self, chunk: Mapping[str, Any], seconds: float) -> None:
        """Take a chunk that came after ``seconds``."""
        self.usage = chunk.get("usage") or self.usage
        choice = next(iter(chunk.get("choices") or ()), None)
        if choice is None:
            return
        text = _text_of(choice)
        ids = choice.get("token_ids")
        finish = choice.get("finish_reason")
        if ids is not None:
            self.tells_ids = True
            self.token_ids += ids
        if text:
            self.text.append(text)
        if text or ids:
            self.chunks += 1
            self.first = seconds if self.first is None else self.first
        if text or ids or finish:
            self.last = seconds
        self.finish_reason = finish or self.finish_reason

    def reply(self) -> Reply:
        """The whole."""
        told = self.usage.get("completion_tokens")
        details = self.usage.get("prompt_tokens_details") or {}
        ids = tuple(self.token_ids) if self.tells_ids else None
        counted = self.chunks if ids is None else len(ids)
        return Reply(
            text="".join(self.text),
            token_ids=ids,
            tokens=counted if told is None else int(told),
            counted=told is None and ids is None,
            chunks=self.chunks,
            seconds=self.last,
            # An answer of an end-of-sequence token alone has no text.
            seconds_to_first=self.last if self.first is None else self.first,
            prompt_tokens=self.usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
            finish_reason=self.finish_reason,
        )


def _text_of(choice: Mapping[str, Any]) -> str:
    """What a chunk adds: of a text, or of a chat with its reasoning and tool calls."""
    if "delta" not in choice:
        return str(choice.get("text") or "")
    delta = choice["delta"] or {}
    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
    calls = [call.get("function") or {} for call in delta.get("tool_calls") or ()]
    called = "".join(
        f"{call.get('name') or ''}{call.get('arguments') or ''}" for call in calls
    )
    return f"{reasoning}{delta.get('content') or ''}{called}"


def _message_of(answer: Any) -> str:
    """A server's words for an error, in any of the shapes in use."""
    if isinstance(answer, Mapping):
        for name in ("error", "message", "detail", "msg"):
            if answer.get(name):
                return _message_of(answer[name])
    if isinstance(answer, list) and answer:
        return "; ".join(_message_of(item) for item in answer)
    return answer if isinstance(answer, str) else json.dumps(answer)


def _seconds_until(told: str | None) -> float | None:
    """What ``Retry-After`` tells: seconds, or a date of HTTP."""
    if told is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(told))
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    return None


def _line(text: str) -> str:
    short = " ".join(text.split())
    return short if len(short) <= LONGEST_MESSAGE else short[:LONGEST_MESSAGE] + "..."
