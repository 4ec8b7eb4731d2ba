"""The contract of every inference engine, to be subclassed in a plugin's tests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import ClassVar

import pytest

from adaptspec.engines.inference_engine import (
    Answer,
    EngineOptions,
    InferenceEngine,
    Launch,
)
from adaptspec.errors import EngineError
from adaptspec.params import Params
from adaptspec.profile import PLAIN, Environment
from adaptspec.workloads import Message, Prompt

NEW_TOKENS = 12
PROMPTS: tuple[Prompt, ...] = (
    Prompt("text", text="Count: one, two, three, one, two, three, one, two,"),
    Prompt("chat", messages=(Message("user", "Say hello, then say hello again."),)),
    Prompt("short", text="Once upon a time", max_new_tokens=4),
)


class InferenceEngineContract:
    """What every inference engine promises, asked of a real one.

    Subclass it in a test module under a name that begins with ``Test``, and give the
    engine and its options, or ``options`` as a fixture::

        class TestMine(InferenceEngineContract):
            engine_class = MyEngine
            options = EngineOptions(engine="mine", model="model.gguf")

    Attributes:
        engine_class: The class under test.
        options: A model that it can run, small.
        prompts: What it answers; prompts with a length of their own among them.
        new_tokens: Of the other answers, at most.
    """

    engine_class: ClassVar[type[InferenceEngine]]
    options: EngineOptions
    prompts: ClassVar[Sequence[Prompt]] = PROMPTS
    new_tokens: ClassVar[int] = NEW_TOKENS

    @pytest.fixture
    def engine(self) -> Iterator[InferenceEngine]:
        """The engine, opened; closed at the end."""
        with self.engine_class.open(self.options) as engine:
            yield engine

    def ask(
        self, engine: InferenceEngine, method: str, prompts: Sequence[Prompt]
    ) -> list[Answer]:
        """Answers with a method's defaults, asked as many at a time as was agreed."""
        params = next(m.Params for m in engine.methods if m.name == method)
        defaults = {spec.name: spec.default for spec in params.specs()}
        size = self.options.concurrency
        found: list[Answer] = []
        for start in range(0, len(prompts), size):
            group = prompts[start : start + size]
            answers = engine.answer(method, defaults, group, self.new_tokens)
            assert len(answers) == len(group)
            found += answers
        return found

    def test_it_says_what_it_is(self) -> None:
        cls = self.engine_class
        assert re.fullmatch(r"[a-z][a-z0-9._-]*", cls.name)
        assert cls.summary
        assert "\n" not in cls.summary
        assert cls.starting >= 0

    def test_plain_decoding_comes_first_and_methods_are_told_apart(
        self, engine: InferenceEngine
    ) -> None:
        methods = list(engine.methods)
        names = [method.name for method in methods]
        assert names[0] == PLAIN
        assert len(names) == len(set(names))
        for method in methods:
            assert method.name.isidentifier()
            assert method.name.islower()
            assert issubclass(method.Params, Params)
            method.Params.specs()
            method.Params()

    def test_what_cannot_be_tried_has_a_reason(self, engine: InferenceEngine) -> None:
        names = {method.name for method in engine.methods}
        for name, reason in engine.unavailable.items():
            assert name not in names
            assert reason
            assert "\n" not in reason

    def test_it_says_what_its_measurements_hold_for(
        self, engine: InferenceEngine
    ) -> None:
        place = engine.environment
        assert isinstance(place, Environment)
        assert place.engine == self.engine_class.name
        assert place.concurrency == self.options.concurrency
        assert place.model
        assert place.model_name
        assert place.threads > 0
        assert place.versions
        assert engine.environment.key() == place.key()
        assert engine.room >= 1

    def test_answers_come_in_order_and_are_as_long_as_asked(
        self, engine: InferenceEngine
    ) -> None:
        answers = self.ask(engine, PLAIN, self.prompts)
        for prompt, answer in zip(self.prompts, answers, strict=True):
            assert isinstance(answer.text, str)
            assert 1 <= answer.tokens <= (prompt.max_new_tokens or self.new_tokens)
            assert answer.token_ids is None or len(answer.token_ids) == answer.tokens
            assert 0 < answer.seconds_to_first <= answer.seconds
            assert 0 <= answer.accepted <= answer.proposed or not answer.proposed
        # In another order the same prompts have the same answers.
        again = self.ask(engine, PLAIN, [*reversed(self.prompts)])
        for prompt, one, other in zip(
            self.prompts, answers, reversed(again), strict=True
        ):
            self.agree(engine, prompt, one, other)

    def test_every_method_answers_as_plain_decoding_does(
        self, engine: InferenceEngine
    ) -> None:
        plain = self.ask(engine, PLAIN, self.prompts)
        for method in engine.methods:
            if not method.lossless:
                continue
            answers = self.ask(engine, method.name, self.prompts)
            for prompt, one, other in zip(self.prompts, plain, answers, strict=True):
                self.agree(engine, prompt, one, other)

    def agree(
        self, engine: InferenceEngine, prompt: Prompt, one: Answer, other: Answer
    ) -> None:
        """Equal, or different by what the engine doesn't call a change."""
        if one.token_ids is None or other.token_ids is None:
            return  # a text can't be told from a near tie's
        pairs = list(zip_longest(one.token_ids, other.token_ids))
        at = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
        if at is None:
            assert one.text == other.text
            return
        if None in pairs[at]:
            return  # one met the end by a near tie, which has no token here
        tied = engine.near_tie(prompt, one.token_ids[:at], *pairs[at])
        assert tied is not False, f"{prompt.id}: token {at} is {pairs[at]}"

    def test_a_near_tie_is_told_or_unknown(self, engine: InferenceEngine) -> None:
        (answer,) = self.ask(engine, PLAIN, self.prompts[:1])
        if answer.token_ids is None:
            return
        first = answer.token_ids[0]
        assert engine.near_tie(self.prompts[0], [], first, first) in (True, None)

    def test_an_unknown_method_is_refused_in_a_line(
        self, engine: InferenceEngine
    ) -> None:
        with pytest.raises(EngineError) as caught:
            engine.answer("no_such_method", {}, self.prompts[:1], self.new_tokens)
        assert "\n" not in str(caught.value)

    def test_it_says_how_it_is_started_or_that_it_is_not(
        self, engine: InferenceEngine
    ) -> None:
        for method in engine.methods:
            launch: Launch | str
            try:
                launch = engine.launch(method.name, {})
            except EngineError as error:
                launch = str(error)
            if isinstance(launch, str):
                assert "\n" not in launch
                continue
            assert isinstance(launch, Launch)
            assert launch.command
            assert all(isinstance(word, str) for word in launch.command)

    def test_it_may_be_closed_twice(self, engine: InferenceEngine) -> None:
        self.ask(engine, PLAIN, self.prompts[:1])
        engine.close()
        engine.close()
