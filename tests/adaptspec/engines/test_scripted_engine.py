"""The contract itself, asked of the engine that tests of tunes use."""

from __future__ import annotations

from typing import Any

import pytest

from adaptspec.engines.inference_engine import Answer, EngineOptions
from adaptspec.testing import InferenceEngineContract
from adaptspec.testing.scripted_engine import Machine, copies_and_drafts, engine_on

MACHINE = Machine(copies_and_drafts({"default": (0.5, 0.5)}))


class TestScriptedEngine(InferenceEngineContract):
    """At two requests at a time."""

    engine_class = engine_on(MACHINE)
    options = EngineOptions(engine="scripted", model="m", concurrency=2)


class Wrong(InferenceEngineContract):
    """Methods change the answer, and the engine says that it is no near tie."""

    engine_class = engine_on(Machine(MACHINE.truth, ties=False))
    options = EngineOptions(engine="scripted", model="m")


def test_the_contract_finds_a_method_that_changes_answers() -> None:
    contract = Wrong()
    with (
        contract.engine_class.open(contract.options) as engine,
        pytest.raises(AssertionError, match="token 1"),
    ):
        contract.test_every_method_answers_as_plain_decoding_does(engine)


def test_the_contract_finds_answers_in_another_order() -> None:
    class Turned(Wrong):
        """Asks two at a time, and gets them the wrong way round."""

        options = EngineOptions(engine="scripted", model="m", concurrency=2)

    cls = Turned.engine_class

    class Backward(cls):  # type: ignore[misc, valid-type]
        def answer(self, *asked: Any) -> list[Answer]:
            return list(reversed(super().answer(*asked)))

    Turned.engine_class = Backward
    with (
        Backward.open(Turned.options) as engine,
        pytest.raises(AssertionError),
    ):
        Turned().test_answers_come_in_order_and_are_as_long_as_asked(engine)
