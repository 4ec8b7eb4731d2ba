"""With which options an engine is compared that was tuned before."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.profile import ProfileStore
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.engines.as_tuned import as_tuned
from measured_engines import DAY, HERE, keep_run

MODEL = EngineOptions(engine=HERE.engine, model="target.gguf")


@pytest.fixture
def store() -> ProfileStore:
    return MemoryStore()


def tuned(store: ProfileStore, day: int, concurrency: int = 1, **record: Any) -> None:
    """A tune of a day at so many requests at a time."""
    keep_run(
        store,
        {"code": (1.0, {("ngram_simple", 6): 1.8})},
        run=f"r{day}",
        environment=replace(HERE, concurrency=concurrency),
        created=DAY + timedelta(days=day),
        concurrency=concurrency,
        **record,
    )


def test_the_newest_tune_at_the_same_load_tells_else_the_newest_at_any(
    store: ProfileStore,
) -> None:
    tuned(store, 1, 4, context=512, threads=3, heads=["h"])
    expected = replace(MODEL, context=512, threads=3, heads=("h",))
    assert as_tuned(MODEL, store) == expected
    asked = replace(MODEL, concurrency=16, threads=2)
    assert as_tuned(asked, store) == replace(expected, concurrency=16, threads=2)
    tuned(store, 3, 8, context=128)
    tuned(store, 2, 1, context=64)
    tuned(store, 4, 1, model="another.gguf", context=32)
    for load, context in ((1, 64), (2, 128), (4, 512), (8, 128)):
        asked = replace(MODEL, concurrency=load)
        assert as_tuned(asked, store).context == context
        assert as_tuned(asked, store).concurrency == load


def test_another_models_tune_tells_nothing(store: ProfileStore) -> None:
    own = EngineOptions(engine=HERE.engine)
    tuned(store, 1, context=512)
    assert as_tuned(replace(MODEL, model="third.gguf"), store).context is None
    assert as_tuned(own, store) == own
    tuned(store, 2, model=None, context=32)
    tuned(store, 3, model="another.gguf", context=64)
    assert as_tuned(own, store) == replace(own, context=32)


@pytest.mark.parametrize("given", ["command", "python"])
def test_a_program_or_a_python_given_anew_leaves_none_of_those_recorded(
    store: ProfileStore, given: str
) -> None:
    tuned(store, 1, engine_command="/old/vllm", engine_python="/old/python", context=8)
    new: dict[str, Any] = {given: "/new"}
    found = as_tuned(replace(MODEL, **new), store)
    assert found == replace(MODEL, context=8, **new)
    assert as_tuned(MODEL, store).command == "/old/vllm"
