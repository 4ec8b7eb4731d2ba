"""Of several classes' settings the one that takes the least time for all of them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.engines.exporting.measured import (
    PLAIN_SETTING,
    Found,
    Setting,
    choices_of,
    found_here,
)
from adaptspec.engines.exporting.mix import best_of_mix, candidates, gain, weights_of
from adaptspec.errors import EngineError
from adaptspec_profiles.memory import MemoryStore
from measured_engines import HERE, Measured, keep_run

A, B = ("ngram_simple", 4), ("draft_simple", 2)
RATIO = st.floats(0.2, 5)


def found_of(measured: Measured, **kept: object) -> Found:
    store = MemoryStore()
    keep_run(store, measured, **kept)  # type: ignore[arg-type]
    choices = choices_of(store, "llama.cpp", None)
    return found_here(store, choices, HERE)


def setting(of: tuple[str, int]) -> Setting:
    return Setting.of(of[0], {"draft_length": of[1]})


def test_it_is_time_that_counts_and_not_the_mean_of_ratios() -> None:
    """Twice as fast on long answers saves more than thrice on short ones."""
    found = found_of(
        {"long": (10.0, {A: 2.0, B: 1.0}), "short": (1.0, {A: 1.0, B: 4.0})}
    )
    weights = weights_of(found, {})
    best = best_of_mix(found, weights, candidates(found))
    assert best is not None
    assert best.setting == setting(A)
    assert best.ratio == pytest.approx((10 + 1) / (10 / 2 + 1))
    # Of the means of their ratios the other is higher.
    assert (1.0 + 4.0) / 2 > (2.0 + 1.0) / 2


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.floats(0.5, 50), RATIO, RATIO, st.integers(1, 9)), min_size=1)
)
def test_the_gain_is_the_time_of_all_prompts_one_after_the_other(
    rows: list[tuple[float, float, float, int]],
) -> None:
    names = [f"class {number}" for number in range(len(rows))]
    found = found_of(
        {n: (s, {A: a, B: b}) for n, (s, a, b, _) in zip(names, rows, strict=True)},
        prompts={n: count for n, (*_, count) in zip(names, rows, strict=True)},
    )
    weights = weights_of(found, {})
    plain = [s for s, _, _, count in rows for _ in range(count)]
    with_a = [s / a for s, a, _, count in rows for _ in range(count)]
    told = gain(found, weights, dict.fromkeys(names, setting(A)))
    assert told == pytest.approx(sum(plain) / sum(with_a))
    best = best_of_mix(found, weights, [PLAIN_SETTING, setting(A), setting(B)])
    with_b = [s / b for s, _, b, count in rows for _ in range(count)]
    least = min(sum(plain), sum(with_a), sum(with_b))
    assert best is not None
    assert sum(plain) / best.ratio == pytest.approx(least)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(RATIO, RATIO), min_size=1))
def test_it_is_never_slower_than_plain_decoding(
    ratios: dict[str, tuple[float, float]],
) -> None:
    found = found_of({n: (1.0, {A: a, B: b}) for n, (a, b) in ratios.items()})
    best = best_of_mix(found, weights_of(found, {}), candidates(found))
    assert best is not None
    assert best.ratio >= 1


def test_a_setting_that_misses_a_class_is_no_candidate_unless_it_weighs_nothing() -> (
    None
):
    found = found_of({"code": (1.0, {A: 3.0, B: 1.5}), "chat": (1.0, {B: 1.2})})
    best = best_of_mix(found, weights_of(found, {}), candidates(found))
    assert best is not None
    assert best.setting == setting(B)
    best = best_of_mix(found, weights_of(found, {"code": 1}), candidates(found))
    assert best is not None
    assert best.setting == setting(A)


@pytest.mark.slow
@given(st.lists(st.tuples(st.floats(0.1, 9), RATIO, RATIO), min_size=2, max_size=4))
def test_the_weights_decide(rows: list[tuple[float, float, float]]) -> None:
    """Each class alone gets what is fastest for it."""
    names = [f"c{number}" for number in range(len(rows))]
    found = found_of(
        {n: (s, {A: a, B: b}) for n, (s, a, b) in zip(names, rows, strict=True)}
    )
    for name, (_, a, b) in zip(names, rows, strict=True):
        best = best_of_mix(found, weights_of(found, {name: 2}), candidates(found))
        ratios = {PLAIN_SETTING: 1.0, setting(A): a, setting(B): b}
        assert best is not None
        assert best.ratio == pytest.approx(max(ratios[s] for s in candidates(found)))


def test_without_kept_seconds_answers_count_alike() -> None:
    found = found_of({"a": (10.0, {A: 2.0}), "b": (1.0, {A: 4.0})})
    of = found.classes["b"]
    blank = replace(of.measured[PLAIN_SETTING], tokens_per_second=0.0)
    classes = {
        **found.classes,
        "b": replace(of, measured={**of.measured, PLAIN_SETTING: blank}),
    }
    told = gain(
        replace(found, classes=classes),
        {"a": 1.0, "b": 1.0},
        dict.fromkeys("ab", setting(A)),
    )
    assert told == pytest.approx(2 / (1 / 2 + 1 / 4))


@pytest.mark.parametrize(("a", "b"), [(1, 3), (3, 1), (2, 2)])
def test_how_often_prompts_were_measured_changes_no_time(a: int, b: int) -> None:
    found = found_of(
        {"a": (10.0, {A: 2.0}), "b": (1.0, {A: 1.0})}, repeats={"a": a, "b": b}
    )
    for name, seconds in (("a", 10.0), ("b", 1.0)):
        assert found.classes[name].seconds(PLAIN_SETTING) == pytest.approx(seconds)
    told = gain(found, {"a": 1.0, "b": 1.0}, dict.fromkeys("ab", setting(A)))
    assert told == pytest.approx((10 + 1) / (10 / 2 + 1))


def test_classes_weigh_as_in_the_workload_and_not_as_measured() -> None:
    measured = {"a": (1.0, {A: 2.0}), "b": (1.0, {A: 1.0})}
    prompts = {"a": 5, "b": 5}
    found = found_of(measured, prompts=prompts, mix={"a": 900, "b": 100})
    assert weights_of(found, {}) == {"a": 900, "b": 100}
    assert weights_of(found, {"a": 1}) == {"a": 1, "b": 0}
    # An older version's runs have none, or another workload's classes.
    for mix in (None, {"a": 900}, {}):
        assert weights_of(found_of(measured, prompts=prompts, mix=mix), {}) == prompts


def test_a_mix_names_measured_classes_and_weighs_something() -> None:
    found = found_of({"a": (1.0, {}), "b": (1.0, {})}, prompts={"a": 3, "b": 5})
    assert weights_of(found, {}) == {"a": 3, "b": 5}
    assert weights_of(found, {"a": 0.5}) == {"a": 0.5, "b": 0}
    with pytest.raises(EngineError, match="no class 'c' was measured; were: a, b"):
        weights_of(found, {"c": 1})
    with pytest.raises(EngineError, match="more than 0"):
        weights_of(found, dict.fromkeys("ab", 0.0))


def test_candidates_are_what_is_reliably_faster_somewhere() -> None:
    found = found_of({"a": (1.0, {A: 1.05, B: 1.5}), "b": (1.0, {A: 1.0, B: 0.5})})
    assert candidates(found) == [PLAIN_SETTING, setting(B)]
    pairs = itertools.product(candidates(found), found.classes.values())
    assert all(of.ratio(s) is not None for s, of in pairs)
