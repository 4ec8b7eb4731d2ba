"""What every profile store must do; subclass it and give ``store``."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import reduce
from operator import add
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptspec.errors import ProfileStoreError
from adaptspec.profile import (
    ClassChoice,
    Environment,
    Measurement,
    Pick,
    Profile,
    ProfileStore,
    Trial,
    Use,
)

_characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
_text = st.text(_characters)
_scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(_characters, max_size=8),
)
_params = st.dictionaries(st.text(_characters, max_size=8), _scalars, max_size=4)
_json = st.recursive(
    st.none() | _scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(_characters, max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
_zones = st.integers(-14 * 60, 14 * 60).map(lambda m: timezone(timedelta(minutes=m)))
_times = st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=_zones)

# One store is filled by all draws of a test: none may depend on its being empty.
_drawn = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
    ],
)


def example_profile(**changes: Any) -> Profile:
    """A profile with every field set; ``changes`` replace some."""
    environment = Environment(
        *("m1", "target", "d1", "draft", "bfloat16", "cpu", "A CPU", 2),
        *({"torch": "2.13"}, "h1", "heads", "c1", "packed bfloat16", "sdpa"),
    )
    measurement = Measurement(
        *(20.0, 18.0, 22.0, 1.5, 1.2, 1.7, 2.5, 0.6, 4, 400, 3, 1, 10.0, 2.0, 0.5),
        *(1.25, 1.65, 80.0, 2**31, "latency"),
    )
    profile = Profile(
        environment=environment,
        workload="w1",
        workload_name="mine",
        prompt_class="chat",
        strategy="prompt_lookup",
        params={"k": 4, "stop": 0.25, "policy": "recent", "on": True},
        measurement=measurement,
        created=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc),
        run="r1",
    )
    return replace(profile, **changes)


def example_choice(**changes: Any) -> ClassChoice:
    """A choice with every field set, of the example's profile."""
    profile = example_profile()
    pick = Pick(
        *("prompt_lookup", dict(profile.params), "measured 1.50x", 1.5, 1.25, 1.65),
        *(False, False, True),
    )
    choice = ClassChoice(
        environment=profile.environment,
        run=profile.run,
        prompt_class=profile.prompt_class,
        created=profile.created,
        picks=[pick],
        reason="nothing is reliably faster",
        prompts=4,
        tried=["prompt_lookup", "suffix"],
        objective="latency",
        pinned=False,
    )
    return replace(choice, **changes)


class ProfileStoreContract:
    """The promises of :class:`adaptspec.profile.ProfileStore`."""

    @pytest.fixture
    def store(self) -> ProfileStore:
        """An empty store."""
        raise NotImplementedError

    def test_controls_that_are_no_scalars_are_kept(self, store: ProfileStore) -> None:
        """A grammar's schema, and stop strings."""
        schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
        controls = {"temperature": 0.7, "stop": ["a", "b"], "json_schema": schema}
        profile = example_profile()
        measured = replace(profile.measurement, controls=controls)
        store.add_profiles([replace(profile, measurement=measured)])
        (kept,) = store.profiles()
        assert kept.measurement.controls == controls
        assert kept.measurement.measured_how.startswith("measured at temperature 0.7 ")

    def test_a_profile_comes_back_as_it_was_put(self, store: ProfileStore) -> None:
        profile = example_profile()
        (profile_id,) = store.add_profiles([profile])
        assert store.profile(profile_id) == replace(profile, id=profile_id)
        assert store.profile(profile_id + 1) is None

    def test_profiles_come_newest_first_and_filtered(self, store: ProfileStore) -> None:
        old = example_profile()
        later = old.created + timedelta(seconds=1)
        new = example_profile(run="r2", prompt_class="code", created=later)
        other = example_profile(
            run="r3", environment=replace(old.environment, model="m2")
        )
        store.add_profiles([old, new, other])
        assert [p.run for p in store.profiles(model="m1")] == ["r2", "r1"]
        assert [p.run for p in store.profiles(prompt_class="code")] == ["r2"]
        assert [p.run for p in store.profiles(run="r3")] == ["r3"]
        assert store.profiles(model="nowhere") == []

    def test_a_setting_measured_again_keeps_its_id_and_another_gets_its_own(
        self, store: ProfileStore
    ) -> None:
        first = store.add_profiles([example_profile()])
        other = store.add_profiles([example_profile(baseline=True)])
        assert store.add_profiles([example_profile(), example_profile()]) == first * 2
        assert first != other
        later = example_profile().created + timedelta(seconds=1)
        again = example_profile(params={"k": 9}, created=later)
        (new,) = store.add_profiles([again])  # the strategy, measured again
        assert new not in first + other
        assert store.profile(first[0]) is None
        kept = store.profiles(run="r1")
        assert sorted((p.baseline, p.params.get("k")) for p in kept) == [
            (False, 9),
            (True, 4),
        ]

    def test_settings_of_one_strategy_confirmed_together_stand_side_by_side(
        self, store: ProfileStore
    ) -> None:
        old = store.add_profiles([example_profile(params={"k": 4})])
        later = example_profile().created + timedelta(seconds=1)
        both = [example_profile(params={"k": k}, created=later) for k in (9, 4)]
        new, same = store.add_profiles(both)
        assert [same] == old
        assert new != same
        assert {p.params["k"] for p in store.profiles(run="r1")} == {4, 9}
        # Measured again with one of them alone.
        last = example_profile(params={"k": 9}, created=later + timedelta(seconds=1))
        assert store.add_profiles([last]) == [new]
        assert [p.id for p in store.profiles(run="r1")] == [new]

    def test_a_choice_comes_back_as_it_was_put(self, store: ProfileStore) -> None:
        store.put_choices([example_choice()])
        assert store.choices() == [example_choice()]
        store.put_choices([example_choice(reason="another")])
        (found,) = store.choices(model="m1", run="r1")
        assert found.reason == "another"
        assert store.choices(model="m2") == store.choices(run="r2") == []

    def test_a_run_is_pinned_and_stays_so_when_it_decides_again(
        self, store: ProfileStore
    ) -> None:
        other = example_choice(run="r2")
        store.put_choices([example_choice(), other])
        assert store.pin("r1", True) == 1
        assert store.pin("nowhere", True) == 0
        store.put_choices([example_choice(), other])
        assert {c.run: c.pinned for c in store.choices()} == {"r1": True, "r2": False}
        store.pin("r1", False)
        assert not any(c.pinned for c in store.choices())

    def test_a_deleted_run_decides_nothing_any_more(self, store: ProfileStore) -> None:
        store.put_choices([example_choice(), example_choice(run="r2")])
        store.delete_run("r1")
        assert [c.run for c in store.choices()] == ["r2"]

    @_drawn
    @given(_text, _params, _times, st.floats(0, 1e300))
    def test_any_profile_comes_back_in_utc(
        self,
        store: ProfileStore,
        text: str,
        params: dict[str, Any],
        time: datetime,
        speed: float,
    ) -> None:
        measurement = replace(example_profile().measurement, tokens_per_second=speed)
        put = example_profile(
            run=text,
            prompt_class=text,
            params=params,
            created=time,
            measurement=measurement,
        )
        (profile_id,) = store.add_profiles([put])
        found = store.profile(profile_id)
        assert found == replace(put, id=profile_id)
        # 1, 1.0 and True are equal, and not the same.
        assert repr(sorted(found.params.items())) == repr(sorted(params.items()))
        assert found.created.utcoffset() == timedelta(0)
        assert found in store.profiles(run=text, prompt_class=text)

    @_drawn
    @given(_text, _params, st.dictionaries(_text, _json, max_size=3))
    def test_any_trial_and_record_come_back(
        self,
        store: ProfileStore,
        text: str,
        params: dict[str, Any],
        detail: dict[str, Any],
    ) -> None:
        number = len(store.trials(text))
        trial = Trial(text, text, text, number, params, text, 1.5, detail)
        store.add_trial(trial)
        store.put_record(text, text, detail)
        assert store.trials(text)[number] == trial
        assert store.record(text, text) == detail
        assert repr(store.record(text, text)) == repr(detail)

    @pytest.mark.parametrize(
        "changes",
        [
            {"created": datetime(2026, 1, 2)},
            {"created": datetime.max.replace(tzinfo=timezone(-timedelta(hours=9)))},
            {"created": datetime.min.replace(tzinfo=timezone(timedelta(hours=9)))},
            {"params": {"k": math.nan}},
            {"params": {"k": 2**63}},
            {"params": {"k": None}},
            {"params": {"k": (1, 2)}},
            {"params": {1: 2}},
            {"prompt_class": "\ud800"},
            {"prompt_class": "a\0b"},
            {"params": {"k": "\0"}},
            {"strategy": None},
            {"measurement": replace(example_profile().measurement, ratio=math.inf)},
            {"environment": replace(example_profile().environment, threads=2**70)},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_a_profile_that_no_database_could_give_back_is_refused_with_its_batch(
        self, store: ProfileStore, changes: dict[str, Any]
    ) -> None:
        with pytest.raises(ProfileStoreError, match=next(iter(changes))):
            store.add_profiles([example_profile(), example_profile(**changes)])
        assert store.profiles() == []

    def test_a_number_that_is_none_is_refused_in_trials_and_records(
        self, store: ProfileStore
    ) -> None:
        with pytest.raises(ProfileStoreError, match="value"):
            store.add_trial(Trial("r1", "chat", "x", 0, {}, "complete", math.nan))
        with pytest.raises(ProfileStoreError, match=r"a\.1"):
            store.put_record("r1", "plain", {"a": [0.0, -math.inf]})
        assert store.trials("r1") == []
        assert store.record("r1", "plain") is None

    def test_tuples_come_back_as_lists(self, store: ProfileStore) -> None:
        store.put_record("r1", "plain", {"a": (1, (2,))})
        store.add_trial(Trial("r1", "chat", "x", 0, {}, "complete", 1.0, {"n": (1,)}))
        assert store.record("r1", "plain") == {"a": [1, [2]]}
        assert store.trials("r1")[0].detail == {"n": [1]}

    def test_what_the_caller_changes_later_stays_outside(
        self, store: ProfileStore
    ) -> None:
        params: dict[str, Any] = {"k": 1}
        detail: dict[str, Any] = {"n": [1]}
        (profile_id,) = store.add_profiles([example_profile(params=params)])
        store.add_trial(Trial("r1", "chat", "x", 0, params, "complete", 1.0, detail))
        store.put_record("r1", "plain", detail)

        def given_back() -> list[Any]:
            profile = store.profile(profile_id)
            assert profile is not None
            every = [profile, *store.profiles()]
            trial = store.trials("r1")[0]
            return [
                *(p.params for p in every),
                *(p.environment.versions for p in every),
                *(trial.params, trial.detail, store.record("r1", "plain")),
            ]

        before = repr(given_back())
        for theirs in (params, detail, *given_back()):
            theirs["more"] = 5
        detail["n"].append(2)
        assert repr(given_back()) == before

    def test_an_id_that_no_profile_can_have_finds_none(
        self, store: ProfileStore
    ) -> None:
        store.add_profiles([example_profile()])
        for profile_id in (-1, 0, 2**63, 10**30):
            assert store.profile(profile_id) is None

    def test_a_trial_is_stored_once(self, store: ProfileStore) -> None:
        trial = Trial("r1", "chat", "x", 0, {"k": 2}, "complete", 12.5, {"n": [1]})
        failed = Trial("r1", "chat", "x", 1, {"k": 3}, "failed", None, {})
        for t in (failed, trial, replace(trial, value=99.0)):
            store.add_trial(t)
        assert store.trials("r1") == [trial, failed]
        assert store.trials("r2") == []

    @_drawn
    @given(_text, st.integers(0, 2**40), st.floats(-1e9, 1e9), st.floats(0.1, 1))
    def test_uses_are_added_up_by_profile_and_class(
        self,
        store: ProfileStore,
        prompt_class: str,
        count: int,
        value: float,
        kept: float,
    ) -> None:
        one, two = store.add_profiles([example_profile(), example_profile(run="r2")])
        known = {(u.profile, u.prompt_class): u for u in store.uses()}
        use = Use(one, prompt_class, 1, count, 3, 4, 5, 0.5, 2.0, value, 1.0, 1.0, kept)
        other = replace(use, profile=two)
        store.add_uses([use, other])
        store.add_uses([use])
        for key, written in ((one, [use, use]), (two, [other])):
            before = known.get((key, prompt_class))
            # One after the other: floating-point sums depend on the order.
            expected = reduce(add, written if before is None else [before, *written])
            found = {(u.profile, u.prompt_class): u for u in store.uses()}
            assert found[key, prompt_class] == replace(expected, kept=1.0)
        assert list(found) == sorted(found)

    def test_what_is_known_of_a_ratio_fades_and_what_is_not_known_does_not_appear(
        self, store: ProfileStore
    ) -> None:
        one, two = store.add_profiles([example_profile(), example_profile(run="r2")])
        use = Use(one, "chat", 1, 2, 3, 4, 5, 0.5, 2.0, 0.5, 0.25, 1.0)
        fading = Use(one, "chat", 0, 0, 0, 0, 0, 0.0, 0.0, kept=0.5)
        store.add_uses([use])
        store.add_uses([fading, replace(fading, profile=two)])
        faded = replace(use, log_ratio=0.25, log_ratio_squared=0.125, weight=0.5)
        assert store.uses() == [faded]

    def test_uses_end_with_their_profile(self, store: ProfileStore) -> None:
        one, two = store.add_profiles([example_profile(), example_profile(run="r2")])
        use = Use(one, "chat", 1, 2, 3, 4, 5, 0.5, 2.0, -1.0, 1.0)
        other = replace(use, profile=two)
        store.add_uses([use, other, replace(use, profile=two + 1)])
        assert store.uses() == [use, other]
        store.add_profiles([example_profile()])  # the same once more
        assert store.uses() == [use, other]
        later = example_profile().created + timedelta(days=1)
        store.add_profiles([example_profile(created=later)])
        assert store.uses() == [other]
        store.delete_run("r2")
        assert store.uses() == []

    def test_the_id_of_a_deleted_profile_is_never_given_again(
        self, store: ProfileStore
    ) -> None:
        (old,) = store.add_profiles([example_profile()])
        store.delete_run("r1")
        (new,) = store.add_profiles([example_profile(run="r2")])
        assert new != old
        # A decoder that still goes by the old id adds nothing to the new one's.
        store.add_uses([Use(old, "chat", 1, 2, 3, 4, 5, 0.5, 2.0, -1.0, 1.0)])
        assert store.uses() == []

    def test_records_are_replaced_and_runs_deleted(self, store: ProfileStore) -> None:
        store.put_record("r1", "plain", {"a": [1.5, None]})
        store.put_record("r1", "plain", {"a": {"b": "c"}})
        store.add_trial(Trial("r1", "chat", "x", 0, {}, "complete", 1.0))
        store.add_profiles([example_profile(), example_profile(run="r2")])
        assert store.record("r1", "plain") == {"a": {"b": "c"}}
        assert store.delete_run("r1") == 1
        assert store.record("r1", "plain") is None
        assert store.trials("r1") == []
        assert [p.run for p in store.profiles()] == ["r2"]
