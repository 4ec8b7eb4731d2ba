"""An inference engine on a fake clock, whose true speeds are known.

For tests and simulations of tunes without any engine.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from adaptspec.engines.inference_engine import (
    PLAIN_METHOD,
    Answer,
    EngineOptions,
    InferenceEngine,
    Launch,
    Method,
)
from adaptspec.errors import EngineError
from adaptspec.params import Params, Scalar, Tunable
from adaptspec.profile import PLAIN, Environment
from adaptspec.testing.fakes import FakeClock
from adaptspec.workloads import Prompt, Workload


class CopyParams(Params):
    """Of a method that copies from the text before."""

    length: Annotated[int, Tunable(2, 32, log=True)] = Field(default=8)
    ngram: Annotated[int, Tunable(1, 4)] = Field(default=2)


class DraftParams(Params):
    """Of a method that asks a draft model."""

    length: Annotated[int, Tunable(1, 16, log=True)] = Field(default=5)


class KindParams(Params):
    """Of a method that fails in one of its forms."""

    kind: Annotated[Literal["good", "bad"], Tunable()] = "bad"


COPY = Method("copy", "copies", CopyParams)
DRAFT = Method("draft", "asks a draft model", DraftParams)

# Class -> how likely a copied token is right, how likely a drafted one.
Chances = Mapping[str, tuple[float, float]]
# Prompt, method and parameters -> how many times as fast as plain decoding steps are.
Truth = Callable[[Prompt, str, Mapping[str, Scalar]], float]


def emitted(chance: float, length: int) -> float:
    """Tokens that a forward yields, where each of ``length`` drafts is right with
    ``chance`` if those before it are."""
    return sum(chance**depth for depth in range(length + 1))


def copies_and_drafts(
    chances: Chances, *, row: float = 0.03, drafted: float = 0.35, spread: float = 0.03
) -> Truth:
    """The truth of :data:`COPY` and :data:`DRAFT`.

    Args:
        row: Of a plain step, what one more row costs.
        drafted: Of a plain step, what a draft model's token costs.
        spread: Standard deviation of a prompt's chances.
    """

    def truth(prompt: Prompt, method: str, params: Mapping[str, Scalar]) -> float:
        draw = random.Random(prompt.id).gauss(0, spread)
        copied, right = chances[prompt.prompt_class]
        length = int(params.get("length", 8))
        if method == DRAFT.name:
            cost = 1 + (drafted + row) * length
            return emitted(min(0.98, max(0.0, right + draw)), length) / cost
        wrong = abs(int(params.get("ngram", 2)) - 3)
        chance = min(0.98, max(0.0, copied - 0.04 * wrong + draw))
        # There is something to copy in some steps only.
        return emitted(chance, length) / (1 + row * length * chance)

    return truth


@dataclass
class Machine:
    """What a scripted engine decodes on.

    Args:
        truth: How fast methods are; plain decoding's steps take ``token``.
        token: Seconds of a plain step.
        noise: Standard deviation of the log of one answer's time.
        tokens: Of an answer, at most.
        prefill: Seconds until the first token, by class; 0.5 of others.
        start: Seconds in which a setting is made ready.
        load: How many times as long a step takes with another request beside it.
        room: Settings that can be ready at the same time.
        methods: Without plain decoding.
        fails: Told method, parameters and the number of answers so far: why it fails.
        told_ids: Whether answers have token ids.
        ties: Whether methods' answers differ, and what the engine says of that.
    """

    truth: Truth
    token: float = 0.065
    noise: float = 0.0
    tokens: int = 64
    prefill: Mapping[str, float] = field(default_factory=dict)
    start: float = 2.0
    load: float = 1.1
    room: int = 4
    methods: Sequence[Method] = (COPY, DRAFT)
    fails: Callable[[str, Mapping[str, Scalar], int], str | None] = (
        lambda method, params, count: None
    )
    told_ids: bool = True
    ties: bool | Literal["never", "unknown"] = "never"
    clock: FakeClock = field(default_factory=FakeClock)

    def seconds(
        self,
        prompt: Prompt,
        method: str,
        params: Mapping[str, Scalar],
        tokens: int,
        beside: int = 0,
    ) -> tuple[float, float]:
        """What an answer truly takes, until its first token and after it.

        Args:
            beside: Other requests at the same time.
        """
        step = self.token * (1 + (self.load - 1) * beside)
        if method != PLAIN:
            step /= self.truth(prompt, method, params)
        first = self.prefill.get(prompt.prompt_class, 0.5)
        return first, (tokens - 1) * step


class ScriptedEngine(InferenceEngine):
    """Answers by a machine's truth; what it did is counted."""

    name = "scripted"
    summary = "an engine of tests"
    machine: ClassVar[Machine]
    opened: ClassVar[list[ScriptedEngine]]

    def __init__(self, options: EngineOptions) -> None:
        self.options, self.answers = options, 0
        self.ready: list[tuple[str, str]] = []
        self.log: list[tuple[str, Mapping[str, Scalar], list[str]]] = []
        self.starts, self.closed = 0, False
        self._luck = random.Random(1)

    @classmethod
    def open(cls, options: EngineOptions) -> InferenceEngine:
        if options.model == "missing":
            raise EngineError("no model 'missing'; give --model")
        opened = cls(options)
        cls.opened.append(opened)
        return opened

    @property
    def environment(self) -> Environment:
        return Environment(
            *("digest", self.options.model or "served", None, None),
            *("bf16", "cpu", "a machine", 2),
            versions={self.name: "7.1", "adaptspec": "1"},
            engine=self.name,
            concurrency=self.options.concurrency,
        )

    @property
    def methods(self) -> Sequence[Method]:
        return [PLAIN_METHOD, *self.machine.methods]

    @property
    def unavailable(self) -> Mapping[str, str]:
        return {"eagle": "no heads were given (--heads)"}

    @property
    def room(self) -> int:
        return self.machine.room

    def answer(
        self,
        method: str,
        params: Mapping[str, Scalar],
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> list[Answer]:
        machine, key = self.machine, (method, repr(sorted(params.items())))
        if method not in {known.name for known in self.methods}:
            raise EngineError(f"{self.name} has no method {method!r}")
        if reason := machine.fails(method, params, self.answers):
            raise EngineError(f"{self.name} ended: {reason}")
        if key not in self.ready:
            machine.clock.advance(machine.start)
            self.starts += 1
        self.ready = [*(k for k in self.ready if k != key), key][-machine.room :]
        self.log.append((method, dict(params), [p.id for p in prompts]))
        self.answers += len(prompts)
        found = [
            self._one(
                *(method, params, prompt, prompt.max_new_tokens or max_new_tokens),
                len(prompts),
            )
            for prompt in prompts
        ]
        machine.clock.advance(max(answer.seconds for answer in found))
        return found

    def _one(
        self,
        method: str,
        params: Mapping[str, Scalar],
        prompt: Prompt,
        most: int,
        beside: int,
    ) -> Answer:
        machine = self.machine
        tokens = min(most, machine.tokens)
        first, decoding = machine.seconds(prompt, method, params, tokens, beside - 1)
        luck = math.exp(self._luck.gauss(0.0, machine.noise))
        first_id = 100 * (1 + zlib.crc32(prompt.id.encode()) % 1000)
        ids = list(range(first_id, first_id + tokens))
        if method != PLAIN and machine.ties != "never":
            ids[1:] = [token + 1 for token in ids[1:]]
        return Answer(
            text=" ".join(map(str, ids)),
            token_ids=ids if machine.told_ids else None,
            tokens=tokens,
            seconds=first + luck * decoding,
            seconds_to_first=first,
        )

    def near_tie(
        self, prompt: Prompt, tokens: Sequence[int], one: int, other: int
    ) -> bool | None:
        if self.machine.ties == "unknown":
            return None
        return one == other or self.machine.ties is True

    def launch(self, method: str, params: Mapping[str, Scalar]) -> Launch:
        return Launch(["fake-server", "--method", method])

    def close(self) -> None:
        self.closed = True


def engine_on(machine: Machine, name: str = "scripted") -> type[ScriptedEngine]:
    """An engine of its own for a machine; ``opened`` has its objects."""
    values = {"machine": machine, "name": name, "starting": machine.start, "opened": []}
    return type("Engine", (ScriptedEngine,), values)


def workload_of(classes: Sequence[str], prompts: int = 8) -> Workload:
    """As many prompts of each class."""
    return Workload(
        "w",
        tuple(
            Prompt(f"{name}/{number}", name, text=f"{name} {number}")
            for name in classes
            for number in range(prompts)
        ),
    )
