"""Measures settings of any inference engine, with as few of its starts as can be."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from statistics import median
from typing import TYPE_CHECKING

from adaptspec.engines.inference_engine import Answer
from adaptspec.errors import AdaptSpecError, EngineError, stopped_by_user
from adaptspec.params import Scalar
from adaptspec_tuner.measuring.in_turns import Generating
from adaptspec_tuner.measuring.profiler import (
    PLAIN_SETTING,
    Agreement,
    Sample,
    Setting,
    first_difference,
    in_a_line,
    sample_of_whole,
)
from adaptspec_tuner.measuring.whole import Whole, whole_generation
from adaptspec_tuner.records import answer_key

if TYPE_CHECKING:
    from adaptspec.decoding.engine import Generation
    from adaptspec.engines.inference_engine import InferenceEngine
    from adaptspec.workloads import Prompt, Workload
    from adaptspec_tuner.records import RunRecords


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
        beside_one: Settings that are measured beside the same plain answers where the
            engine has room for one setting alone.
        clock: Seconds.

    Attributes:
        keeps: Whether starts take so long that a setting is measured once on each
            prompt; as the engine says, or as :meth:`check` saw it.
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
        beside_one: int = 4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._max_new_tokens = engine, max_new_tokens
        self._concurrency, self._warm_up_tokens = concurrency, warm_up_tokens
        self._dear, self._beside_one, self._clock = dear, beside_one, clock
        self._groups = [group for part in parts for group in part.by_class().values()]
        self._parts: list[Sequence[Prompt]] = [
            part for group in self._groups for part in even_parts(group, concurrency)
        ]
        # No prompt that is measured: an engine may have to forget what it was asked. It
        # is read as they are, raw or as a user's message.
        self._warming = replace(
            self._groups[0][0],
            text="Hello",
            messages=(),
            tools=(),
            max_new_tokens=warm_up_tokens,
        )
        self.keeps, self.starts = engine.starting >= dear, 0
        self._ready: list[str] = []  # setting keys, the one asked last at the end
        self._took: dict[str, float] = {}  # setting key -> seconds of its first start
        self._broken: dict[str, Exception] = {}
        # Ids of prompts that failed together with others, and don't alone.
        self._answered_alone: set[str] = set()
        # Setting key and prompt id -> what is measured already, for the next to ask.
        self._waiting: dict[tuple[str, str], Answer | Exception] = {}

    @property
    def starting(self) -> float:
        """Seconds that a new setting takes to be ready, the first little answer
        included: typical of those started so far, else what the engine says."""
        return median(self._took.values()) if self._took else self._engine.starting

    @property
    def beside_plain(self) -> int:
        """How many settings are measured beside the same plain answers."""
        room = self._engine.room
        return room - 1 if room > 1 else self._beside_one

    def starts_for(self, settings: int) -> int:
        """How many starts as many settings take, those of plain decoding included."""
        alone = self._engine.room == 1  # else plain decoding stays ready beside them
        return settings + (math.ceil(settings / self._beside_one) if alone else 0)

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

    def measure_ahead(
        self,
        asked: Sequence[tuple[Setting, Sequence[Prompt]]],
        in_time: Callable[[], bool] = lambda: True,
        records: RunRecords | None = None,
    ) -> list[Setting] | None:
        """Measure now, each setting started once, what can't all be kept ready.

        As many settings as there is room for are measured in turns with plain decoding.
        What they took is told as it would have been beside the first of these plain
        answers to a prompt, so that all settings can be compared with that one.

        Args:
            asked: Settings (not plain decoding), and prompts on which they are measured
                next.
            in_time: Whether another setting may be started; the first is anyway.
            records: Where each answer is kept as it comes, and read where it was kept
                before; None: it isn't.

        Returns:
            The settings that are measured; None where they aren't measured ahead.
        """
        crowded = len(asked) >= self._engine.room
        again = any(len({*map(self._part_of, of)}) > 1 for _, of in asked)
        if not (self.keeps or (crowded and again)):
            return None
        if records is not None:
            self._read(asked, records)
        wanted = [
            (setting, missing)
            for setting, prompts in asked
            if (missing := [p for p in prompts if self._lacks(setting, p)])
        ]
        late: set[str] = set()
        size = self.beside_plain
        for start in range(0, len(wanted), size):
            if start and not in_time():
                late |= {setting.key for setting, _ in wanted[start:]}
                break
            late |= self._in_turns(wanted[start : start + size], in_time, records)
        return [setting for setting, _ in asked if setting.key not in late]

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
        # Plain decoding was asked, for which the engine may have ended another setting.
        key = PLAIN_SETTING.key
        self._ready = (
            [*(k for k in self._ready if k != key), key] if key in self._ready else []
        )
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
        """See that plain decoding answers at all, and how long its start takes.

        Raises:
            AdaptSpecError: if it doesn't.
        """
        try:
            self._warm(PLAIN_SETTING)
        # A third party's engine may raise anything.
        except Exception as error:
            if stopped_by_user(error) or isinstance(error, AdaptSpecError):
                raise
            raise EngineError(
                f"{self._engine.name} can't decode plainly: {in_a_line(error)}"
            ) from error
        self.keeps = max(self._engine.starting, self.starting) >= self._dear

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
        if isinstance(known, Exception):
            raise known
        return known

    def _lacks(self, setting: Setting, prompt: Prompt) -> bool:
        return (setting.key, prompt.id) not in self._waiting

    def _read(
        self,
        asked: Sequence[tuple[Setting, Sequence[Prompt]]],
        records: RunRecords,
    ) -> None:
        """Take what was kept of what is asked, and of plain decoding."""
        for setting, prompts in asked:
            for one in (PLAIN_SETTING, setting):
                for prompt in prompts:
                    place = one.key, prompt.id
                    record = (
                        None
                        if place in self._waiting
                        else records.get(answer_key(*place))
                    )
                    # A damaged record is measured again.
                    with suppress(TypeError):
                        if record is not None:
                            self._waiting[place] = Answer(**record)

    def _in_turns(
        self,
        asked: Sequence[tuple[Setting, Sequence[Prompt]]],
        in_time: Callable[[], bool],
        records: RunRecords | None,
    ) -> set[str]:
        """Settings on prompts beside plain decoding, prompt by prompt if all have
        room, else setting by setting.

        A prompt that can't be decoded plainly is asked of no setting.

        Returns:
            Keys of the settings that there was no time to begin; the first always is.
        """
        wants = {setting.key: {p.id for p in prompts} for setting, prompts in asked}
        prompts = list({p.id: p for _, of in asked for p in of}.values())
        order = [PLAIN_SETTING, *(setting for setting, _ in asked)]
        wants[PLAIN_SETTING.key] = {p.id for p in prompts}
        turns = [(prompt, setting) for prompt in prompts for setting in order]
        if len(order) > self._engine.room:
            turns = [(prompt, setting) for setting in order for prompt in prompts]
        plain: dict[str, Answer | Exception] = {}
        failed: dict[str, Exception] = {}
        begun: set[str] = set()
        late: set[str] = set()
        for prompt, setting in turns:
            key, is_plain = setting.key, setting == PLAIN_SETTING
            known = plain if is_plain else self._of(key)
            if prompt.id in known or prompt.id not in wants[key] or key in late:
                continue
            if not is_plain:
                first = self._waiting[PLAIN_SETTING.key, prompt.id]
                if isinstance(first, Exception):
                    self._waiting[key, prompt.id] = first
                    continue
                if key in failed:
                    self._waiting[key, prompt.id] = failed[key]
                    continue
                if key not in begun and begun and not in_time():
                    late.add(key)
                    continue
                begun.add(key)
            found: dict[str, Answer | Exception] = {}
            try:
                found.update(self._ask(setting, prompt))
            # A third party's engine may raise anything.
            except Exception as error:
                if stopped_by_user(error):
                    raise
                found[prompt.id] = error
                if not is_plain:
                    failed[key] = error
            for name, told in found.items():
                if is_plain:
                    plain.setdefault(name, told)
                else:
                    told = self._beside(told, name, plain)
                self._take(key, name, told, records)
        return late

    def _of(self, key: str) -> set[str]:
        """Ids of the prompts on which a setting is measured already."""
        return {name for known, name in self._waiting if known == key}

    def _beside(
        self,
        told: Answer | Exception,
        name: str,
        plain: Mapping[str, Answer | Exception],
    ) -> Answer | Exception:
        """What a setting told of a prompt, as beside its first plain answer."""
        now = plain.get(name)
        first = self._waiting.get((PLAIN_SETTING.key, name))
        if (
            isinstance(told, Answer)
            and isinstance(now, Answer)
            and isinstance(first, Answer)
        ):
            return beside(told, now, first)
        return told

    def _take(
        self,
        key: str,
        name: str,
        told: Answer | Exception,
        records: RunRecords | None,
    ) -> None:
        """Keep what a setting told of a prompt, unless something is kept of it."""
        if (key, name) in self._waiting:
            return
        self._waiting[key, name] = told
        if records is not None and isinstance(told, Answer):
            records.put(answer_key(key, name), asdict(told))

    def _ask(self, setting: Setting, prompt: Prompt) -> dict[str, Answer]:
        """Answers of a prompt and of those that are asked together with it."""
        together = self._together(prompt)
        self._make_ready(setting)
        try:
            answers = self._answers(setting, together)
        # A third party's engine may raise anything.
        except Exception as error:
            if setting != PLAIN_SETTING or stopped_by_user(error):
                raise
            if not self._set_apart(together):
                raise
            return self._ask(setting, prompt)
        found: dict[str, Answer] = {}
        for one, answer in zip(together, answers, strict=True):
            found.setdefault(one.id, answer)
        return found

    def _answers(self, setting: Setting, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answers of prompts at the same time, by a setting that is ready."""
        self._ready.remove(setting.key)
        answers = self._engine.answer(
            setting.strategy, setting.params, prompts, self._max_new_tokens
        )
        self._ready.append(setting.key)
        return answers

    def _set_apart(self, together: Sequence[Prompt]) -> bool:
        """Where prompts failed together, make parts of their own of those that fail
        alone, too, so that they fail no others.

        Returns:
            Whether there are such.

        Raises:
            Exception: of an engine that answers nothing any more.
        """
        distinct = list({one.id: one for one in together}.values())
        if len(distinct) == 1:
            return False
        apart: list[Prompt] = []
        for one in distinct:
            if one.id in self._answered_alone:
                continue
            self._make_ready(PLAIN_SETTING)
            try:
                self._answers(PLAIN_SETTING, [one])
            # A third party's engine may raise anything.
            except Exception as error:
                if stopped_by_user(error):
                    raise
                apart.append(one)
            else:
                self._answered_alone.add(one.id)
        kept = [[one for one in part if one not in apart] for part in self._parts]
        self._parts = [*filter(None, kept), *([one] for one in apart)]
        return bool(apart)

    def _make_ready(self, setting: Setting) -> None:
        if setting.key not in self._ready:
            self._warm(setting)

    def _warm(self, setting: Setting) -> None:
        """Start a setting, and let it answer a greeting a little, which doesn't
        count."""
        if setting.key in self._broken:
            raise self._broken[setting.key]
        self.starts += 1
        began = self._clock()
        try:
            self._engine.answer(
                setting.strategy,
                setting.params,
                [self._warming] * self._concurrency,
                self._warm_up_tokens,
            )
        # A third party's engine may raise anything.
        except Exception as error:
            if setting != PLAIN_SETTING and not stopped_by_user(error):
                self._broken[setting.key] = error  # it isn't tried again
            raise
        # The first: later ones may find it ready.
        self._took.setdefault(setting.key, self._clock() - began)
        self._ready = [*self._ready, setting.key][-self._engine.room :]

    def _part_of(self, prompt: Prompt) -> int | None:
        """The number of the part of a class that is answered at the same time."""
        parts = enumerate(self._parts)
        return next((at for at, part in parts if prompt in part), None)

    def _together(self, prompt: Prompt) -> list[Prompt]:
        """The prompt's part of its class, some of it again where that has fewer than
        are answered at a time. No prompt is in two parts, so it isn't asked twice."""
        at = self._part_of(prompt)
        part = (prompt,) if at is None else self._parts[at]
        return [part[n % len(part)] for n in range(self._concurrency)]


def even_parts(prompts: Sequence[Prompt], most: int) -> list[Sequence[Prompt]]:
    """As few parts of no more than ``most`` as can be, about as large as each other."""
    count = math.ceil(len(prompts) / most)
    ends = [number * len(prompts) // count for number in range(count + 1)]
    return [prompts[a:b] for a, b in itertools.pairwise(ends)]


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
