"""What every profile store must do; subclass it and give ``store``."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from adaptspec.profile import Environment, Measurement, Profile, ProfileStore, Trial


def example_profile(**changes: Any) -> Profile:
    """A profile with every field set; ``changes`` replace some."""
    environment = Environment(
        "m1", "target", "d1", "draft", "bfloat16", "cpu", "A CPU", 2, {"torch": "2.13"}
    )
    measurement = Measurement(
        20.0, 18.0, 22.0, 1.5, 1.2, 1.7, 2.5, 0.6, 4, 400, 3, 1, 10.0, 2.0, 0.5
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


class ProfileStoreContract:
    """The promises of :class:`adaptspec.profile.ProfileStore`."""

    @pytest.fixture
    def store(self) -> ProfileStore:
        """An empty store."""
        raise NotImplementedError

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

    def test_a_setting_measured_again_replaces_the_older_one(
        self, store: ProfileStore
    ) -> None:
        store.add_profiles([example_profile()])
        store.add_profiles([example_profile(params={"k": 9})])
        store.add_profiles([example_profile(baseline=True)])
        kept = store.profiles(run="r1")
        assert sorted((p.baseline, p.params.get("k")) for p in kept) == [
            (False, 9),
            (True, 4),
        ]

    def test_a_trial_is_stored_once(self, store: ProfileStore) -> None:
        trial = Trial("r1", "chat", "x", 0, {"k": 2}, "complete", 12.5, {"n": [1]})
        failed = Trial("r1", "chat", "x", 1, {"k": 3}, "failed", None, {})
        for t in (failed, trial, replace(trial, value=99.0)):
            store.add_trial(t)
        assert store.trials("r1") == [trial, failed]
        assert store.trials("r2") == []

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
