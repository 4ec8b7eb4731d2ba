"""Any OpenAI-compatible server that runs already, measured from outside as deployed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from adaptspec.engines.inference_engine import (
    Answer,
    EngineOptions,
    InferenceEngine,
    Method,
)
from adaptspec.engines.openai_client import (
    CompletionRequest,
    OpenAIClient,
    RefusedError,
    Reply,
)
from adaptspec.errors import EngineError
from adaptspec.params import Scalar
from adaptspec.profile import PLAIN, Environment
from adaptspec.strategy import NoParams
from adaptspec.workloads import Prompt

KEY_VARIABLE = "OPENAI_API_KEY"
PATIENCE = 6  # times that a busy server is asked again, within about a minute
# Types of llama.cpp with which an answer may be copied from an earlier request's.
REMEMBERING = ("ngram-mod", "ngram-cache")
AS_DEPLOYED = Method(
    PLAIN, "as deployed: whatever the server decodes with; nothing is set from here"
)


class OpenAIServer(InferenceEngine):
    """One model of a server that somebody else started."""

    name = "openai"
    summary = "an OpenAI-compatible server at a URL, measured as deployed"

    def __init__(self, options: EngineOptions, client: OpenAIClient) -> None:
        self._client = client
        self._concurrency = options.concurrency
        models = _models(client, options.model)
        self._model = _chosen(options.model, [str(m["id"]) for m in models], client)
        told: Mapping[str, Any] = next(
            (m for m in models if m["id"] == self._model), {}
        )
        self._kind, self._version = _server(client, str(told.get("owned_by") or ""))
        self._asked: set[Prompt] = set()
        self._asked_again = False
        self._remembering: Sequence[str] | None = None
        self._reads_texts = False
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._tells_cache = False
        self._counted = False
        self._cut = 0

    @classmethod
    def open(cls, options: EngineOptions) -> OpenAIServer:
        """Ask the server what it serves; nothing is generated."""
        if "://" not in options.engine:
            raise EngineError(
                f"the engine {cls.name!r} is given as its address, e.g. `--engine "
                f"http://127.0.0.1:8000/v1`, got {options.engine!r}"
            )
        _refuse_what_is_deployed(options)
        key = options.api_key or os.environ.get(KEY_VARIABLE)
        client = OpenAIClient(options.engine, key, patience=PATIENCE)
        try:
            return cls(options, client)
        except BaseException:
            client.close()
            raise

    @property
    def environment(self) -> Environment:
        """The server's address and model; its machine can't be seen from here."""
        address = self._client.base
        told = hashlib.sha256(f"{address}\n{self._model}".encode())
        return Environment(
            model=told.hexdigest()[:16],
            model_name=self._model,
            draft=None,
            draft_name=None,
            dtype="as deployed",
            device="server",
            device_name=address,
            threads=0,
            versions={
                "adaptspec": version("adaptspec"),
                "python": platform.python_version(),
                self._kind: self._version,
            },
            engine=self.name,
            concurrency=self._concurrency,
        )

    @property
    def methods(self) -> Sequence[Method]:
        """One: what is deployed."""
        return (AS_DEPLOYED,)

    @property
    def notes(self) -> Sequence[str]:
        """What the server's replies say about the figures."""
        notes = []
        if self._cached_tokens:
            notes.append(
                f"The server read {self._cached_tokens} of {self._prompt_tokens} "
                "prompt tokens from its cache, so first tokens came sooner than on "
                "prompts that it hasn't seen."
            )
        elif self._prompt_tokens and not self._tells_cache and not self._cacheless():
            notes.append(
                "The server doesn't say whether it reads prompts from a cache of "
                "earlier requests; where it does, first tokens of repeated prompts "
                "come sooner than on new ones."
            )
        if self._asked_again:
            notes += self._memory_notes()
        if self._cut:
            notes.append(
                "Answers that the server cut before they had as many tokens as were "
                f"asked for: {self._cut}. Its context or a limit of its own is shorter,"
                " so these figures are of shorter answers; leave out long prompts, or "
                "ask for fewer tokens."
            )
        if self._counted:
            notes.append(
                "The server doesn't count tokens: the chunks of its streams were "
                "counted, so a chunk of several tokens counts once."
            )
        return notes

    def _memory_notes(self) -> Sequence[str]:
        """What a prompt that was asked again may gain."""
        sooner = "a prompt that is asked again may get its earlier answer sooner"
        if self._remembering is None:
            return [
                "The server doesn't say whether it drafts from earlier answers, as "
                f"suffix decoding and ngram-mod do; where it does, {sooner}."
            ]
        if self._remembering:
            names = " and ".join(self._remembering)
            return [f"The server drafts by {names} from earlier requests: {sooner}."]
        return []

    def answer(
        self,
        method: str,
        params: Mapping[str, Scalar],
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> list[Answer]:
        """All prompts at the same time, at temperature 0."""
        if method != PLAIN:
            raise EngineError(
                f"{self.name}: no method {method!r}; a deployed server has one: {PLAIN}"
            )
        NoParams.parse(params, method)
        try:
            replies = self._ask(prompts, max_new_tokens)
        except RefusedError as error:
            if self._reads_texts or "chat template" not in error.message.lower():
                raise
            # As ours does: without a chat template, a text is read as it is.
            self._reads_texts = True
            replies = self._ask(prompts, max_new_tokens)
        self._remember(prompts)
        for prompt, reply in zip(prompts, replies, strict=True):
            asked = prompt.max_new_tokens or max_new_tokens
            whole = reply.counted or reply.tokens >= asked
            self._cut += reply.finish_reason == "length" and not whole
        return [self._answer(reply) for reply in replies]

    def _remember(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            read = replace(prompt, id="", max_new_tokens=None)
            if read in self._asked and not self._asked_again:
                self._asked_again = True
                self._remembering = _drafts_from_memory(self._client, self._kind)
            self._asked.add(read)

    def close(self) -> None:
        """Close the connections; the server goes on."""
        self._client.close()

    def _ask(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Reply]:
        return self._client.ask([self._request(p, max_new_tokens) for p in prompts])

    def _request(self, prompt: Prompt, max_new_tokens: int) -> CompletionRequest:
        body: dict[str, Any] = {
            "model": self._model,
            "temperature": 0,
            "max_tokens": prompt.max_new_tokens or max_new_tokens,
            **self._fields(),
        }
        if prompt.text is not None and (prompt.raw or self._reads_texts):
            return CompletionRequest("completions", {**body, "prompt": prompt.text})
        if prompt.text is not None:
            messages = [{"role": "user", "content": prompt.text}]
        else:
            messages = [message.as_dict() for message in prompt.messages]
        if prompt.tools:
            body["tools"] = [dict(tool) for tool in prompt.tools]
        return CompletionRequest("chat/completions", {**body, "messages": messages})

    def _fields(self) -> dict[str, Any]:
        """What keeps caches of prompts out, and greedy greedy, on servers that say so.

        None of it changes what the model reads.
        """
        if self._kind == "vllm":
            # A penalty may come from the model's generation_config.json.
            return {
                "cache_salt": uuid.uuid4().hex,
                "repetition_penalty": 1.0,
                "return_token_ids": True,
            }
        if self._kind == "llama.cpp":
            return {"cache_prompt": False}
        return {}

    def _cacheless(self) -> bool:
        return self._kind in ("vllm", "llama.cpp")

    def _answer(self, reply: Reply) -> Answer:
        self._counted |= reply.counted
        self._prompt_tokens += reply.prompt_tokens or 0
        self._cached_tokens += reply.cached_tokens or 0
        self._tells_cache |= reply.cached_tokens is not None
        return Answer(
            text=reply.text,
            token_ids=reply.token_ids,
            tokens=reply.tokens,
            seconds=reply.seconds,
            seconds_to_first=reply.seconds_to_first,
        )


def _refuse_what_is_deployed(options: EngineOptions) -> None:
    """Whoever started the server has decided these."""
    plain = EngineOptions()
    names = {
        "draft_model": "--draft-model",
        "heads": "--heads",
        "command": "--engine-command",
        "python": "--engine-python",
        "arguments": "arguments of the engine",
        "dtype": "--dtype",
        "device": "--device",
        "threads": "--threads",
        "batch_threads": "--batch-threads",
        "context": "the context's length",
        "trust_remote_code": "--trust-remote-code",
    }
    given = [
        words
        for name, words in names.items()
        if getattr(options, name) and getattr(options, name) != getattr(plain, name)
    ]
    if given:
        raise EngineError(
            f"{options.engine}: a server that runs already has its own settings; "
            f"leave out {', '.join(given)}"
        )
    if options.concurrency < 1:
        raise EngineError(f"concurrency must be 1 or more, got {options.concurrency}")


def _models(client: OpenAIClient, wanted: str | None) -> list[Mapping[str, Any]]:
    """What the server lists; nothing where it has no list and a model is told."""
    try:
        told = client.get("models")
    except RefusedError as error:
        if wanted is not None and error.status in (404, 405, 501):
            return []
        raise
    listed = told.get("data") if isinstance(told, Mapping) else None
    if not isinstance(listed, list):
        raise EngineError(
            f"{client.base}/models: an OpenAI-compatible server lists its models "
            "there under `data`; check the address"
        )
    return [m for m in listed if isinstance(m, Mapping) and m.get("id")]


def _chosen(wanted: str | None, listed: Sequence[str], client: OpenAIClient) -> str:
    if wanted is not None:
        if listed and wanted not in listed:
            raise EngineError(
                f"{client.base}: no model {wanted!r}; it serves: {', '.join(listed)}"
            )
        return wanted
    if len(listed) != 1:
        served = f"serves {', '.join(listed)}" if listed else "names no model"
        raise EngineError(f"{client.base} {served}; name one with --model")
    return listed[0]


def _server(client: OpenAIClient, owner: str) -> tuple[str, str]:
    """What the server is and its version, as far as it tells."""
    kinds = {
        "vllm": ("vllm", "version", "version"),
        "llamacpp": ("llama.cpp", "props", "build_info"),
        "sglang": ("sglang", "server_info", "version"),
    }
    kind, path, field = kinds.get(owner, ("server", "", ""))
    if path:
        with contextlib.suppress(EngineError):
            told = client.get(path, root=True)
            if isinstance(told, Mapping) and told.get(field):
                return kind, str(told[field])
        return kind, "unknown"
    header = None
    with contextlib.suppress(EngineError):  # it may have no list of models
        header = client.header("models", "server")
    return kind, header or owner or "unknown"


def _drafts_from_memory(client: OpenAIClient, kind: str) -> Sequence[str] | None:
    """Its speculative types that remember earlier requests; None: it doesn't tell."""
    if kind != "llama.cpp":
        return None
    told: set[str] = set()
    try:
        for slot in client.get("slots", root=True):
            if not slot["speculative"]:
                continue
            if "params" in slot:  # of its last request
                told.update(slot["params"]["speculative.types"].split(","))
    except (EngineError, KeyError, TypeError, AttributeError):
        return None
    return sorted(told & set(REMEMBERING))
