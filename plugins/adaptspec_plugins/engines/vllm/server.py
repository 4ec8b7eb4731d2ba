"""A server of vLLM with one setting: what it is asked, and how it fails."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from adaptspec.engines.openai_client import (
    CompletionRequest,
    OpenAIClient,
    RefusedError,
    Reply,
)
from adaptspec.engines.processes import ServerProcess
from adaptspec.errors import EngineError
from adaptspec.workloads import Prompt
from adaptspec_plugins.engines.vllm.counters import Counters

SECONDS_OF_SILENCE = 600.0  # the longest, also before the first token
SECONDS_TO_COUNT = 1.0
SECONDS_TO_END = 2.0
FAILED = 500  # statuses of HTTP from here on are the server's fault
# What went wrong in another of its processes stands far above what it prints last.
ERRORS = r"(?<!Runtime)(Error|Exception|Interrupt): |error: |RuntimeError: (?!Engine )"


class Server:
    """One that runs with a setting."""

    def __init__(self, process: ServerProcess, model: str) -> None:
        self.model = model
        self._closing = ExitStack()
        self._process = self._closing.enter_context(process)
        self._client = self._closing.enter_context(
            OpenAIClient(process.url, timeout=SECONDS_OF_SILENCE)
        )

    def ask(self, requests: Sequence[CompletionRequest]) -> list[Reply]:
        """Answers, or how the process ended, where it did."""
        try:
            return self._client.ask(requests)
        except EngineError as error:
            raise self._told(error) from None

    def post(self, path: str, body: Mapping[str, Any], root: bool = False) -> Any:
        """The same of a request that isn't streamed."""
        try:
            return self._client.post(path, {"model": self.model, **body}, root=root)
        except EngineError as error:
            raise self._told(error) from None

    def encode(self, prompt: Prompt) -> tuple[list[int], int | None]:
        """As its own tokenizer and chat template read a prompt, and how many tokens a
        prompt may have with its answer, where it tells."""
        if prompt.text is not None and prompt.raw:
            return self._tokenized({"prompt": prompt.text})
        if prompt.text is not None:
            messages = [{"role": "user", "content": prompt.text}]
        else:
            messages = [message.as_dict() for message in prompt.messages]
        # An assistant's message at the end is continued, as by ours.
        goes_on = messages[-1]["role"] == "assistant"
        chat: dict[str, Any] = {
            "messages": messages,
            "add_generation_prompt": not goes_on,
            "continue_final_message": goes_on,
        }
        if prompt.tools:
            chat["tools"] = [dict(tool) for tool in prompt.tools]
        try:
            return self._tokenized(chat)
        except RefusedError as error:
            if prompt.text is None or "chat template" not in error.message.lower():
                raise
            return self._tokenized({"prompt": prompt.text})

    def _tokenized(self, body: Mapping[str, Any]) -> tuple[list[int], int | None]:
        told = self.post("tokenize", body, root=True)
        return [int(token) for token in told["tokens"]], told.get("max_model_len")

    @property
    def ended(self) -> bool:
        """Whether its process is gone."""
        return self._process.ended is not None

    def counters(self) -> Counters:
        """What it has counted so far."""
        try:
            return Counters.read(self._client.text("metrics"))
        except EngineError as error:
            raise self._told(error) from None

    def counted(self, before: Counters, tokens: int) -> Counters:
        """What it counted since ``before``, as soon as that is ``tokens`` tokens.

        It counts a step after it has sent the step's tokens.
        """
        until = time.monotonic() + SECONDS_TO_COUNT
        while True:
            found = self.counters().since(before)
            if found.generated >= tokens or time.monotonic() > until:
                return found
            time.sleep(0.01)

    def close(self) -> None:
        """End it."""
        self._closing.close()

    @property
    def memory(self) -> int:
        """Bytes that it holds alone."""
        return self._process.memory()

    def _told(self, error: EngineError) -> EngineError:
        """A refusal of what was asked as it is; else what the server's log tells.

        One that doesn't answer any more is ended, so that it isn't asked again.
        """
        if isinstance(error, RefusedError) and 0 < error.status < FAILED:
            return error
        try:
            # A server whose engine died says so, and ends a moment later.
            self._process.check(wait=SECONDS_TO_END, matching=ERRORS)
        except EngineError as ended:
            return ended
        told = EngineError(f"{error}{self._process.tail(ERRORS)}")
        if not isinstance(error, RefusedError):
            self.close()
        return told
