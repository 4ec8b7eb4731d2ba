"""The store without a database, for tests and for one process's life."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptspec.profile import ClassChoice, Profile, Trial, Use
from adaptspec_profiles.as_json import (
    json_value,
    measured_again_first,
    same_choice,
    same_profile,
    same_trial,
    setting_digest,
)


class MemoryStore:
    """Keeps everything in this object; see :class:`adaptspec.profile.ProfileStore`."""

    def __init__(self) -> None:
        self._profiles: dict[int, Profile] = {}
        self._trials: dict[tuple[str, str, str, int], Trial] = {}
        self._records: dict[tuple[str, str], dict[str, Any]] = {}
        self._uses: dict[tuple[int, str], Use] = {}
        self._choices: dict[tuple[str, str], ClassChoice] = {}
        self._next = 1

    @property
    def folder(self) -> Path | None:
        """None: nothing is kept on disk."""
        return None

    @property
    def url(self) -> str:
        """A name for this store; it can't be opened again."""
        return "memory:"

    def add_profiles(self, profiles: Sequence[Profile]) -> list[int]:
        """Add all profiles, or none if one is refused."""
        new = [same_profile(profile) for profile in profiles]
        ids: dict[int, int] = {}
        for index in measured_again_first(new, lambda p: self._same(p) is not None):
            ids[index] = self._put(new[index])
        return [ids[index] for index in range(len(new))]

    def _same(self, profile: Profile) -> int | None:
        """The id of the same setting."""
        wanted = (_strategy(profile), setting_digest(profile.params))
        return next(
            (
                profile_id
                for profile_id, known in self._profiles.items()
                if (_strategy(known), setting_digest(known.params)) == wanted
            ),
            None,
        )

    def _put(self, profile: Profile) -> int:
        profile_id = self._same(profile)
        older = [
            known_id
            for known_id, known in self._profiles.items()
            if _strategy(known) == _strategy(profile)
            and known.created < profile.created
        ]
        if profile_id is None:
            profile_id, self._next = self._next, self._next + 1
        # Measured again: what was seen of the older settings in use doesn't count.
        self._forget_uses(set(older))
        for gone in set(older) - {profile_id}:
            del self._profiles[gone]
        self._profiles[profile_id] = replace(profile, id=profile_id)
        return profile_id

    def profiles(
        self,
        *,
        model: str | None = None,
        prompt_class: str | None = None,
        run: str | None = None,
    ) -> list[Profile]:
        """Matching profiles, newest first."""
        found = [
            p
            for p in self._profiles.values()
            if model in (None, p.environment.model)
            and prompt_class in (None, p.prompt_class)
            and run in (None, p.run)
        ]
        found.sort(key=lambda p: (p.created, p.id or 0), reverse=True)
        return copy.deepcopy(found)

    def profile(self, profile_id: int) -> Profile | None:
        """One profile by its id."""
        return copy.deepcopy(self._profiles.get(profile_id))

    def delete_run(self, run: str) -> int:
        """Forget a run; return how many profiles it had."""
        gone = [i for i, p in self._profiles.items() if p.run == run]
        self._forget_uses(set(gone))
        for i in gone:
            del self._profiles[i]
        for key in [k for k in self._trials if k[0] == run]:
            del self._trials[key]
        for choice in [k for k in self._choices if k[0] == run]:
            del self._choices[choice]
        for record in [k for k in self._records if k[0] == run]:
            del self._records[record]
        return len(gone)

    def put_choices(self, choices: Sequence[ClassChoice]) -> None:
        """Store choices in place of those of their run and class."""
        for choice in [same_choice(choice) for choice in choices]:
            key = (choice.run, choice.prompt_class)
            pinned = self._choices.get(key, choice).pinned
            self._choices[key] = replace(choice, pinned=pinned)

    def choices(
        self, *, model: str | None = None, run: str | None = None
    ) -> list[ClassChoice]:
        """Matching choices, newest first."""
        found = [
            choice
            for choice in self._choices.values()
            if model in (None, choice.environment.model) and run in (None, choice.run)
        ]
        found.sort(key=lambda c: (c.created, c.run, c.prompt_class), reverse=True)
        return copy.deepcopy(found)

    def pin(self, run: str, pinned: bool) -> int:
        """Pin or unpin a run."""
        keys = [key for key in self._choices if key[0] == run]
        for key in keys:
            self._choices[key] = replace(self._choices[key], pinned=pinned)
        return len(keys)

    def add_trial(self, trial: Trial) -> None:
        """Store a trial; the same number again is ignored."""
        trial = same_trial(trial)
        key = (trial.run, trial.prompt_class, trial.strategy, trial.number)
        self._trials.setdefault(key, trial)

    def trials(self, run: str) -> list[Trial]:
        """A run's trials by class, strategy and number."""
        keys = sorted(key for key in self._trials if key[0] == run)
        return copy.deepcopy([self._trials[key] for key in keys])

    def put_record(self, run: str, key: str, value: Mapping[str, Any]) -> None:
        """Keep a record in place of an older one."""
        self._records[json_value(run), json_value(key)] = json_value(value)

    def record(self, run: str, key: str) -> dict[str, Any] | None:
        """A copy of a record, None if there is none."""
        return copy.deepcopy(self._records.get((run, key)))

    def add_uses(self, uses: Sequence[Use]) -> None:
        """Add to the sums; those of profiles that are gone are left out."""
        for use in uses:
            if use.profile in self._profiles:
                key = (use.profile, use.prompt_class)
                known = self._uses.get(key)
                if known is not None:
                    self._uses[key] = replace(known + use, kept=1.0)
                elif use.requests:
                    self._uses[key] = replace(use, kept=1.0)

    def uses(self) -> list[Use]:
        """All sums, by profile and class."""
        return [self._uses[key] for key in sorted(self._uses)]

    def _forget_uses(self, profiles: set[int]) -> None:
        for key in [key for key in self._uses if key[0] in profiles]:
            del self._uses[key]

    def close(self) -> None:
        """Nothing to release."""


def _strategy(profile: Profile) -> tuple[str, str, str, bool]:
    return (profile.run, profile.prompt_class, profile.strategy, profile.baseline)
