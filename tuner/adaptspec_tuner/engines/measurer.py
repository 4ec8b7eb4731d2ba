"""Measures settings of any inference engine, with as few of its starts as can be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptspec.engines.inference_engine import Answer
from adaptspec.errors import EngineError
from adaptspec.params import Scalar
from adaptspec_tuner.measuring.in_turns import Generating
from adaptspec_tuner.measuring.profiler import (
    PLAIN_SETTING,
    Agreement,
    Sample,
    Setting,
    first_difference,
    sample_of_whole,
)
from adaptspec_tuner.measuring.whole import Whole, whole_generation

if TYPE_CHECKING:
    from adaptspec.decoding.engine import Generation
    from adaptspec.engines.inference_engine import InferenceEngine
    from adaptspec.workloads import Prompt, Workload


class EngineMeasurer:
    """A :class:`~adaptspec_tuner.measuring.profiler.TurnMeasurer` over an engine.

    At ``concurrency`` requests at a time a prompt is answered together with others of
    its class; all of their answers count.

    Args:
        parts: The tuning prompts, then those held out: a prompt is answered together
            with others of its part.
        concurrency: Requests at the same time.
        dear: Seconds of the engine's start from which on :attr:`keeps`.
        warm_up_tokens: Of the answer that a newly started setting begins with; it
            doesn't count.

    Attributes:
        keeps: Whether starts take so long that a setting is measured once on each
            prompt, and on the same places of all classes at once.
        starts: How often a setting was asked that wasn't ready, as far as can be told.
    """

    controls: Mapping[str, Scalar | None] = {}
    greedy = True
    most_tokens = None  # the engine itself refuses what is too long for it

    def __init__(
        self,
        engine: InferenceEngine,
        parts: Sequence[Workload],
        max_new_tokens: int,
        concurrency: int = 1,
        *,
        dear: float = 10.0,
        warm_up_tokens: int = 4,
    ) -> None:
        self._engine, self._max_new_tokens = engine, max_new_tokens
        self._concurrency, self._warm_up_tokens = concurrency, warm_up_tokens
        self._groups = [group for part in parts for group in part.by_class().values()]
        every = [prompt for group in self._groups for prompt in group]
        self._shortest = min(every, key=lambda prompt: len(self.ids(prompt)))
        self._tuning = list(parts[0].by_class().values())
        self.keeps, self.starts = engine.starting >= dear, 0
        self._ready: list[str] = []  # setting keys, the one asked last at the end
        self._broken: dict[str, EngineError] = {}
        # Setting key and prompt id -> what is measured already, for the next to ask.
        self._waiting: dict[tuple[str, str], Answer | EngineError] = {}

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        """One answer."""
        return sample_of_whole(self._generation(setting, prompt))

    def begin(
        self,
        setting: Setting,
        prompt: Prompt,
        follow: Callable[[int, int], int] | None = None,
        repeat: int = 0,
    ) -> Generating:
        """An answer in one piece; it can't be made to ``follow`` another."""
        return Whole(lambda: self._generation(setting, prompt))

    def warm_up(self, setting: Setting, prompts: Sequence[Prompt]) -> int:
        """Nothing: whatever isn't ready is started, and warmed up, when it is asked."""
        return 0

    def fits(self, settings: Sequence[Setting], prompt: Prompt) -> bool:
        """True: the engine itself ends what there is no room for."""
        return True

    def forget(self) -> None:
        """Drop answers that nobody asked for, unless each is measured but once."""
        if not self.keeps:
            self._waiting.clear()

    def measure_ahead(self, asked: Sequence[tuple[Setting, Sequence[Prompt]]]) -> bool:
        """Measure now, each setting started once, what can't all be kept ready.

        As many settings as there is room for are measured in turns with plain decoding.
        What they took is told as it would have been beside the first of these plain
        answers to a prompt, so that all settings can be compared with that one.

        Args:
            asked: Settings (not plain decoding), and prompts on which they are measured
                next.

        Returns:
            Whether they are measured.
        """
        crowded = len(asked) >= self._engine.room
        again = any(len(prompts) > self._concurrency for _, prompts in asked)
        if not (self.keeps or (crowded and again)):
            return False
        wanted = [
            (setting, self._missing(setting, prompts)) for setting, prompts in asked
        ]
        wanted = [pair for pair in wanted if pair[1]]
        size = max(1, self._engine.room - 1)
        for start in range(0, len(wanted), size):
            group = wanted[start : start + size]
            every = {p.id: p for _, prompts in group for p in prompts}
            self._in_turns([setting for setting, _ in group], list(every.values()))
        return True

    def ready_first(self, settings: Sequence[Setting]) -> list[Setting]:
        """The same settings, those that needn't be started before the others."""
        return sorted(settings, key=lambda setting: setting.key not in self._ready)

    def agreement(
        self, prompt: Prompt, plain: Sequence[int], other: Sequence[int]
    ) -> Agreement:
        """Where answers differ, the engine says whether by a near tie, if it can."""
        if list(plain) == list(other):
            return "identical"
        if plain and other and min(plain[0], other[0]) < 0:  # texts, not tokens
            return "identical" if plain[0] == other[0] else "not_compared"
        # One that ended early may have met a near tie with the token that ends it.
        if (at := first_difference(plain, other)) is None:
            return "not_compared"
        try:
            tied = self._engine.near_tie(prompt, plain[:at], plain[at], other[at])
        except EngineError:
            tied = None
        if tied is None:
            return "not_compared"
        return "near_tie" if tied else "mismatch"

    def ids(self, prompt: Prompt) -> Sequence[int]:
        """Bytes in place of tokens, which the engine alone knows: equal for prompts
        that are the same."""
        told = [prompt.content, prompt.raw, list(prompt.tools)]
        return list(json.dumps(told, sort_keys=True).encode())

    def length(self, prompt: Prompt) -> int:
        """New tokens that are asked for."""
        return prompt.max_new_tokens or self._max_new_tokens

    def check(self) -> None:
        """See that plain decoding answers at all.

        Raises:
            EngineError: if it doesn't.
        """
        self._warm(PLAIN_SETTING)

    def _generation(self, setting: Setting, prompt: Prompt) -> Generation:
        answer = self._answer(setting, prompt)
        return whole_generation(
            tokens_of(answer),
            answer.seconds,
            min(answer.seconds_to_first, answer.seconds),
            forwards=answer.forwards,
            proposed=answer.proposed,
            accepted=answer.accepted,
        )

    def _answer(self, setting: Setting, prompt: Prompt) -> Answer:
        place = setting.key, prompt.id
        if place not in self._waiting:
            for name, answer in self._ask(setting, prompt).items():
                self._waiting.setdefault((setting.key, name), answer)
        known = self._waiting[place] if self.keeps else self._waiting.pop(place)
        if isinstance(known, EngineError):
            raise known
        return known

    def _missing(self, setting: Setting, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those that aren't measured; where starts are dear, with each tuning prompt
        those at the same place of all classes."""
        found = {p.id: p for p in prompts}
        if self.keeps:
            groups = self._tuning
            places = {g.index(p) for g in groups for p in prompts if p in g}
            found |= {g[k].id: g[k] for g in groups for k in places if k < len(g)}
        return [p for p in found.values() if (setting.key, p.id) not in self._waiting]

    def _in_turns(self, settings: Sequence[Setting], prompts: Sequence[Prompt]) -> None:
        """Settings on prompts beside plain decoding, prompt by prompt if all have
        room, else setting by setting."""
        order = [PLAIN_SETTING, *settings]
        turns = [(prompt, setting) for prompt in prompts for setting in order]
        if len(order) > self._engine.room:
            turns = [(prompt, setting) for setting in order for prompt in prompts]
        found: dict[tuple[str, str], Answer | EngineError] = {}
        failed: set[str] = set()
        for prompt, setting in turns:
            place = setting.key, prompt.id
            if place in found or setting.key in failed:
                continue
            try:
                for name, answer in self._ask(setting, prompt).items():
                    found.setdefault((setting.key, name), answer)
            except EngineError as error:
                found[place] = error
                if setting != PLAIN_SETTING:
                    failed.add(setting.key)
                    found |= {(setting.key, p.id): error for p in prompts}
        for prompt in prompts:
            plain = found[PLAIN_SETTING.key, prompt.id]
            first = self._waiting.setdefault((PLAIN_SETTING.key, prompt.id), plain)
            for setting in settings:
                told = found[setting.key, prompt.id]
                if (
                    isinstance(told, Answer)
                    and isinstance(plain, Answer)
                    and isinstance(first, Answer)
                ):
                    told = beside(told, plain, first)
                self._waiting[setting.key, prompt.id] = told

    def _ask(self, setting: Setting, prompt: Prompt) -> dict[str, Answer]:
        """Answers of a prompt and of those that are asked together with it."""
        together = self._together(prompt)
        if setting.key not in self._ready:
            self._warm(setting)
        self._ready.remove(setting.key)
        answers = self._engine.answer(
            setting.strategy, setting.params, together, self._max_new_tokens
        )
        self._ready.append(setting.key)
        found: dict[str, Answer] = {}
        for one, answer in zip(together, answers, strict=True):
            found.setdefault(one.id, answer)
        return found

    def _warm(self, setting: Setting) -> None:
        """Start a setting, and let it answer the shortest prompt a little, which
        doesn't count."""
        if setting.key in self._broken:
            raise self._broken[setting.key]
        short = [replace(self._shortest, max_new_tokens=self._warm_up_tokens)]
        self.starts += 1
        try:
            self._engine.answer(
                setting.strategy,
                setting.params,
                short * self._concurrency,
                self._warm_up_tokens,
            )
        except EngineError as error:
            if setting != PLAIN_SETTING:  # what can't be started isn't tried again
                self._broken[setting.key] = error
            raise
        self._ready = [*self._ready, setting.key][-self._engine.room :]

    def _together(self, prompt: Prompt) -> list[Prompt]:
        """The prompt, and as many more of its class as are answered at a time; where
        the class has fewer, some of them again."""
        group = next((g for g in self._groups if prompt in g), (prompt,))
        at = group.index(prompt)
        turns = [*group[at:], *group[:at]]
        return [turns[n % len(turns)] for n in range(self._concurrency)]


def tokens_of(answer: Answer) -> list[int]:
    """Its tokens; where the engine tells its text alone, as many negative numbers that
    are the same for the same text."""
    if answer.token_ids is not None:
        return list(answer.token_ids)
    digest = hashlib.sha256(answer.text.encode()).digest()
    return [-1 - int.from_bytes(digest[:6], "big")] * answer.tokens


def beside(answer: Answer, plain: Answer, first: Answer) -> Answer:
    """An answer that was timed beside ``plain``, as it would have been beside
    ``first``, another plain answer to the same prompt."""
    if not (plain.seconds > 0 and plain.tokens and first.tokens):
        return answer
    factor = (first.seconds / first.tokens) / (plain.seconds / plain.tokens)
    return replace(
        answer,
        seconds=factor * answer.seconds,
        seconds_to_first=factor * answer.seconds_to_first,
    )
