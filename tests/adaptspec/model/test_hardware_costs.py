"""Hardware costs: interpolation, storage, freshness."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.decoder import Decoder
from adaptspec.environment import environment_of
from adaptspec.errors import AdaptSpecError
from adaptspec.model.hardware_costs import (
    ForwardCosts,
    HardwareCosts,
    explained,
    measure_costs,
    store_costs,
    stored_costs,
    use_costs,
)
from adaptspec.testing.fakes import noisy_draft, tiny_model
from adaptspec.testing.stores import example_profile
from adaptspec_profiles.memory import MemoryStore
from decided import keep

COSTS = ForwardCosts((100, 300), (1, 5), ((1.0, 3.0), (2.0, 8.0)), 0.5)
OTHERS = {"draft": None, "measured": "", "seconds": 0}


def test_between_contexts_it_is_a_line_and_beyond_them_it_goes_on() -> None:
    assert [COSTS.curve(c)(1) for c in (0, 100, 200, 300, 400)] == [1, 1, 1.5, 2, 2.5]
    assert COSTS.curve(200)(3) == pytest.approx((2.0 + 5.0) / 2)


@pytest.mark.parametrize(
    ("factor", "explains"), [(0.7, False), (0.8, True), (1.25, True), (1.4, False)]
)
def test_costs_explain_forwards_that_take_about_as_long(
    factor: float, explains: bool
) -> None:
    seen = [(c, factor * COSTS.curve(c)(1)) for c in (50, 200, 900)]
    pause = (100, 40.0)
    assert explained(COSTS, [*seen, pause]) is explains
    assert explained(COSTS, [])


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(1, 20))
def test_more_context_never_costs_less(one: int, other: int, rows: int) -> None:
    low, high = sorted((one, other))
    noisy = ForwardCosts((100, 300), (1, 5), ((1.0, 3.0), (0.5, 2.0)))
    for costs in (COSTS, noisy):
        assert costs.curve(low)(rows) <= costs.curve(high)(rows) + 1e-9


@pytest.mark.slow
def test_measured_costs_cover_what_the_model_has_room_for_and_come_back() -> None:
    model = tiny_model("gpt2")  # few positions
    draft = noisy_draft(model)
    costs = measure_costs(model, draft, longest=0.0)
    assert model.max_length is not None
    assert max(costs.target.contexts) + max(costs.target.rows) <= model.max_length
    assert costs.draft is not None
    assert costs.target.moving >= 0
    assert HardwareCosts.from_json(costs.as_json()) == replace(
        costs,
        target=ForwardCosts(**costs.target.as_json()),
        draft=ForwardCosts(**costs.draft.as_json()),
    )


@pytest.mark.slow
def test_a_machine_that_turns_slow_meanwhile_does_so_for_both_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    draft = noisy_draft(model)
    calls, slow_after = 0, 10**9

    def timed(timed_model: object, *rest: object) -> float:
        nonlocal calls
        calls += 1
        return (3.0 if timed_model is model else 1.0) * (
            2.0 if calls > slow_after else 1
        )

    monkeypatch.setattr("adaptspec.model.forward_times._timed", timed)
    measure_costs(model, draft, longest=1e9)
    slow_after, calls = calls // 3, 0
    costs = measure_costs(model, draft, longest=1e9)
    assert costs.draft is not None
    assert costs.target.seconds[0][0] == pytest.approx(3 * costs.draft.seconds[0][0])


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"format": 99},
        {"format": 1, "target": COSTS.as_json(), **OTHERS},  # an older version's
        {"format": 2, "target": {"contexts": [1], "rows": [1], "seconds": []}},
        {"format": 2, "target": {**COSTS.as_json(), "seconds": [[-1.0]]}, **OTHERS},
        {"format": 2, "target": {**COSTS.as_json(), "moving": -1.0}, **OTHERS},
    ],
)
def test_a_damaged_record_is_measured_again(record: dict[str, object]) -> None:
    with pytest.raises(AdaptSpecError):
        HardwareCosts.from_json(record)
    model = tiny_model("llama")
    here = environment_of(model, None)
    store = MemoryStore()
    store_costs(store, here, HardwareCosts(COSTS, None, "2026-01-01", 1.0))
    [key] = [run for run, _ in store._records]
    store.put_record(key, "costs", record)
    assert stored_costs(store, here) is None


def test_they_hold_for_one_environment_and_minor_version() -> None:
    here = environment_of(tiny_model("llama"), None)
    store = MemoryStore()
    store_costs(store, here, HardwareCosts(COSTS, None, "2026-01-01", 1.0))

    def at(torch: str) -> dict[str, str]:
        return {**here.versions, "torch": torch}

    major, minor = here.versions["torch"].split(".")[:2]
    assert stored_costs(store, here) is not None
    patched = replace(here, versions=at(f"{major}.{minor}.99"))
    assert stored_costs(store, patched) is not None
    newer = replace(here, versions=at(f"{major}.{int(minor) + 1}.0"))
    assert stored_costs(store, newer) is None
    assert stored_costs(store, replace(here, threads=here.threads + 1)) is None


def test_an_application_starts_with_what_tuning_measured() -> None:
    model = tiny_model("llama")
    here = environment_of(model, None)
    store = MemoryStore()
    store_costs(store, here, HardwareCosts(COSTS, None, "2026-01-01", 1.0))
    keep(store, [example_profile(environment=here)])
    Decoder(model, None, store)
    assert list(model.latency.rows) == [1, 5]


def test_a_draft_without_measured_costs_keeps_its_own() -> None:
    model = tiny_model("llama")
    draft = noisy_draft(model)
    use_costs(HardwareCosts(COSTS, None, "2026-01-01", 1.0), model, draft)
    assert "latency" not in draft.__dict__
