"""A ``llama-server`` with one setting: its prompts, answers and probabilities."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from adaptspec.engines.inference_engine import Answer
from adaptspec.engines.processes import ServerProcess, start_server
from adaptspec.errors import EngineError
from adaptspec_plugins.engines.llama_cpp.program import variables

if TYPE_CHECKING:
    from adaptspec.workloads import Prompt

ANSWER_SECONDS = 60.0  # to wait, beside those for each token
# Greedy, whatever the model file or the user's arguments say of sampling.
GREEDY: Mapping[str, Any] = {
    "temperature": 0.0,
    "top_k": 1,
    "samplers": ["top_k", "temperature"],
    "mirostat": 0,
    "ignore_eos": False,
    # Read every prompt anew, and keep no answer for a later one.
    "cache_prompt": False,
    "stream": False,
    "return_tokens": True,
}
# The rest of an answer repeats what was asked.
FIELDS = [
    *("content", "tokens", "timings", "truncated", "tokens_predicted"),
    "completion_probabilities",
]


class LlamaServer:
    """A server that is ready; made by :meth:`start`.

    Args:
        process: The server's, ended by :meth:`stop`, or where it doesn't answer.
        token_seconds: Waited for each token of prompts and answers, a minute beside;
            a server that takes longer is taken for stuck, and ended.

    Attributes:
        context: Tokens that a slot holds, the answer's too.
        answered: Tokens of prompts that it has answered since it was started.
    """

    def __init__(self, process: ServerProcess, token_seconds: float = 1.0) -> None:
        import httpx2

        self.process = process
        self._token_seconds = token_seconds
        self._stuck = ""  # what was told of it when it gave no answer
        self.answered: set[tuple[int, ...]] = set()
        self._client = httpx2.Client(
            base_url=process.url,
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,  # no proxy stands before loopback
        )
        try:
            properties = self._ask("GET", "/props")
        except BaseException:
            self.stop()
            raise
        self.context = int(properties["default_generation_settings"]["n_ctx"])

    @classmethod
    def start(
        cls, command: Sequence[str], slots: int, speculates: bool, deadline: float
    ) -> LlamaServer:
        """Start a command, to which address and port are added.

        Every slot has answered a short prompt then, so that the first prompt that
        counts isn't the one that finds buffers and graphs unmade.

        Args:
            slots: Requests that it answers at the same time.
            speculates: Whether its setting is one of speculation. A server whose
                draft model doesn't fit goes on without it; that is an error here.
            deadline: Seconds until it must be ready.

        Raises:
            EngineError: where it doesn't start, in one line with the tail of its log.
        """
        process = start_server(
            "llama-server",
            lambda port: [*command, "--host", "127.0.0.1", "--port", str(port)],
            deadline=deadline,
            environment=variables(),
            telling=r"(^|\s)E\s|error|failed",
        )
        server = cls(process)
        try:
            if speculates:
                server.check_speculation()
            for slot in range(slots):
                server.ask_shortly(slot)
        except BaseException:
            server.stop()
            raise
        return server

    def check_speculation(self) -> None:
        """Raise where speculation was asked for and isn't on."""
        slots = self._ask("GET", "/slots")
        if not all(slot.get("speculative", True) for slot in slots):
            raise EngineError(
                "llama-server started without speculation; the draft model may not "
                f"fit the target{self.process.tail(r'spec|draft|vocab')}"
            )

    def encode(self, prompt: Prompt, has_template: bool) -> list[int]:
        """A prompt's tokens, its chat rendered by the server.

        Args:
            has_template: Whether the model file or the command has a chat template.
        """
        text = prompt.text
        if text is None or (has_template and not prompt.raw):
            if not has_template:
                raise EngineError(
                    f"llama.cpp: prompt {prompt.id!r} is a chat, but the model file "
                    "has no chat template; give one by --engine-argument="
                    "--chat-template-file --engine-argument=FILE, or use texts"
                )
            messages = (
                [message.as_dict() for message in prompt.messages]
                if text is None
                else [{"role": "user", "content": text}]
            )
            body: dict[str, Any] = {"messages": messages}
            if prompt.tools:
                body["tools"] = [dict(tool) for tool in prompt.tools]
            text = self._ask("POST", "/apply-template", body)["prompt"]
        body = {"content": text, "add_special": True, "parse_special": True}
        tokens = self._ask("POST", "/tokenize", body)["tokens"]
        if not tokens:
            raise EngineError(f"llama.cpp: prompt {prompt.id!r} has no tokens")
        return [int(token) for token in tokens]

    def ask_shortly(self, slot: int) -> None:
        """Have a slot read two tokens and give one.

        This empties its table of ngram-map-k and -k4v: both drop what lies behind the
        end of a shorter prompt (``common_ngram_map_begin``), which is all of it.
        """
        body = {**GREEDY, "prompt": [0, 0], "n_predict": 1, "id_slot": slot}
        self._ask("POST", "/completion", body, tokens=3)

    def answer(
        self, prompts: Sequence[tuple[Sequence[int], int]], forget: bool
    ) -> list[Answer]:
        """Answer prompts at the same time, each in a slot of its own.

        Args:
            prompts: Tokens, and the most tokens of the answer.
            forget: Empty the slots' tables of n-grams before.
        """
        if forget:
            for slot in range(len(prompts)):
                self.ask_shortly(slot)
        together = sum(len(tokens) + length for tokens, length in prompts)
        if len(prompts) == 1:
            return [self._answer(0, *prompts[0], together)]
        with ThreadPoolExecutor(len(prompts)) as pool:
            waiting = [
                pool.submit(self._answer, slot, *prompt, together)
                for slot, prompt in enumerate(prompts)
            ]
            try:
                return [one.result() for one in waiting]
            except BaseException:
                self.stop()  # so that the other threads don't wait for their answers
                raise

    def _answer(
        self, slot: int, tokens: Sequence[int], length: int, together: int
    ) -> Answer:
        """One answer.

        Args:
            together: Tokens of all requests at the same time, and of their answers.
        """
        asked = {
            **GREEDY,
            "prompt": list(tokens),
            "n_predict": length,
            "id_slot": slot,
            "response_fields": FIELDS,
        }
        started = time.perf_counter()
        told = self._ask("POST", "/completion", asked, together)
        seconds = time.perf_counter() - started
        if told.get("truncated"):
            raise EngineError(
                f"llama.cpp: an answer was cut at {self.context} tokens of context; "
                "tell a longer context"
            )
        ids = [int(token) for token in told["tokens"]]
        timings = told["timings"]
        accepted = int(timings.get("draft_n_accepted", 0))
        # The server's clock runs from the first token to the last.
        after_first = min(seconds, timings["predicted_ms"] / 1000)
        return Answer(
            text=told["content"],
            token_ids=ids,
            tokens=len(ids),
            seconds=seconds,
            seconds_to_first=seconds - after_first,
            # The prompt's forward gives the first token, every other one that and
            # what was accepted of its draft, of which an end may cut some.
            forwards=max(0, len(ids) - 1 - accepted) if accepted else len(ids) - 1,
            proposed=int(timings.get("draft_n", 0)),
            accepted=accepted,
        )

    def most_probable(self, tokens: Sequence[int], count: int) -> dict[int, float]:
        """The ``count`` tokens most probable after ``tokens`` -> natural logarithm."""
        asked = {**GREEDY, "prompt": list(tokens), "n_predict": 1, "n_probs": count}
        told = self._ask("POST", "/completion", asked, len(tokens) + 1)
        first = told["completion_probabilities"][0]["top_logprobs"]
        return {int(one["id"]): float(one["logprob"]) for one in first}

    def _ask(
        self,
        how: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        tokens: int = 0,
    ) -> Any:
        import httpx2

        wait = ANSWER_SECONDS + self._token_seconds * tokens
        try:
            answer = self._client.request(
                how, path, json=body, timeout=httpx2.Timeout(wait, connect=10.0)
            )
        except httpx2.HTTPError as error:
            if isinstance(error, httpx2.ReadTimeout) and not self._stuck:
                self._stuck = (
                    f"llama-server gave no answer to {path} within {wait:g} s (a "
                    f"minute, and {self._token_seconds:g} s for each of {tokens} "
                    "tokens of prompts and answers) and was ended; leave this method "
                    f"out, or take a smaller model{self.process.tail()}"
                )
                self.stop()
            if self._stuck:  # also for those who waited beside
                raise EngineError(self._stuck) from error
            self.process.check(wait=2.0)
            raise EngineError(
                f"llama-server didn't answer {path}: {type(error).__name__}: {error}"
                f"{self.process.tail()}"
            ) from error
        if answer.status_code != 200:
            raise EngineError(
                f"llama-server refused {path} with {answer.status_code}: "
                f"{_message(answer)}"
            )
        return answer.json()

    def stop(self) -> None:
        """End it."""
        self.process.stop()
        self._client.close()


def _message(answer: Any) -> str:
    """What an error's JSON says, else its text, in one line."""
    try:
        told = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        told = answer.text
    return " ".join(str(told).split())[:500]
