"""The store without a database, for tests and for one process's life."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptspec.profile import Profile, Trial


class MemoryStore:
    """Keeps everything in this object; see :class:`adaptspec.profile.ProfileStore`."""

    def __init__(self) -> None:
        self._profiles: dict[int, Profile] = {}
        self._trials: dict[tuple[str, str, str, int], Trial] = {}
        self._records: dict[tuple[str, str], dict[str, Any]] = {}
        self._next = 1

    @property
    def folder(self) -> Path | None:
        """Nowhere."""
        return None

    @property
    def url(self) -> str:
        """Nowhere."""
        return "memory:"

    def add_profiles(self, profiles: Sequence[Profile]) -> list[int]:
        """Store or replace."""
        ids = []
        for profile in profiles:
            setting = _setting(profile)
            for old in [i for i, p in self._profiles.items() if _setting(p) == setting]:
                del self._profiles[old]
            self._profiles[self._next] = replace(profile, id=self._next)
            ids.append(self._next)
            self._next += 1
        return ids

    def profiles(
        self,
        *,
        model: str | None = None,
        prompt_class: str | None = None,
        run: str | None = None,
    ) -> list[Profile]:
        """Matching ones, newest first."""
        found = [
            p
            for p in self._profiles.values()
            if model in (None, p.environment.model)
            and prompt_class in (None, p.prompt_class)
            and run in (None, p.run)
        ]
        return sorted(found, key=lambda p: (p.created, p.id or 0), reverse=True)

    def profile(self, profile_id: int) -> Profile | None:
        """One by id."""
        return self._profiles.get(profile_id)

    def delete_run(self, run: str) -> int:
        """Forget a run."""
        gone = [i for i, p in self._profiles.items() if p.run == run]
        for i in gone:
            del self._profiles[i]
        for key in [k for k in self._trials if k[0] == run]:
            del self._trials[key]
        for record in [k for k in self._records if k[0] == run]:
            del self._records[record]
        return len(gone)

    def add_trial(self, trial: Trial) -> None:
        """Store once."""
        key = (trial.run, trial.prompt_class, trial.strategy, trial.number)
        self._trials.setdefault(key, trial)

    def trials(self, run: str) -> list[Trial]:
        """In order."""
        return [self._trials[key] for key in sorted(self._trials) if key[0] == run]

    def put_record(self, run: str, key: str, value: Mapping[str, Any]) -> None:
        """Store or replace."""
        self._records[run, key] = copy.deepcopy(dict(value))

    def record(self, run: str, key: str) -> dict[str, Any] | None:
        """A copy."""
        return copy.deepcopy(self._records.get((run, key)))

    def close(self) -> None:
        """Nothing to release."""


def _setting(profile: Profile) -> tuple[str, str, str, bool]:
    return (profile.run, profile.prompt_class, profile.strategy, profile.baseline)
