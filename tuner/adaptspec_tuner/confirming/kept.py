"""What a run that is continued confirmed before, where it still counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptspec.profile import EVERY_CLASS, PLAIN, Profile
from adaptspec.selector import Choice
from adaptspec.workloads import Workload
from adaptspec_tuner.confirming.confirm import Confirmed
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING
from adaptspec_tuner.records import confirmed_key, predicted_key
from adaptspec_tuner.reporting.result import ClassResult, Tried
from adaptspec_tuner.searching.search import Arm
from adaptspec_tuner.tuning_run import TuningRun


@dataclass(frozen=True)
class Kept:
    """A class as it is stored: its profiles, and the record of what was confirmed."""

    profiles: Sequence[Profile]
    record: Mapping[str, Any]

    @property
    def prompts(self) -> int:
        """On how many prompts it was confirmed."""
        return len(self.record["ratios"])


def kept_classes(run: TuningRun) -> dict[str, Kept]:
    """Class -> what is stored of it, of those that can be decided on again.

    Left out are classes whose record is gone, and those that only strategies were
    confirmed in that are gone: their choices would be lost.
    """
    stored: dict[str, list[Profile]] = {}
    for profile in run.store.profiles(run=run.id):
        stored.setdefault(profile.prompt_class, []).append(profile)
    stored.pop(EVERY_CLASS, None)
    names = {PLAIN, *(cls.name for cls in run.given.strategies)}
    kept: dict[str, Kept] = {}
    for name, profiles in stored.items():
        known = [p for p in profiles if p.baseline or p.strategy in names]
        record = run.store.record(run.id, confirmed_key(name)) or {}
        only_gone = len(known) < len(profiles) and all(
            p.strategy == PLAIN for p in known
        )
        if record.get("ratios") and not only_gone:
            kept[name] = Kept(known, record)
    return kept


def kept_class(
    run: TuningRun,
    arms: Sequence[Arm],
    held_out: Workload,
    name: str,
    confirmed: Mapping[str, Confirmed],
) -> tuple[ClassResult, dict[str, Any]] | None:
    """The class as it is stored, where that is on more than twice as many prompts.

    Args:
        confirmed: What was confirmed now; empty where there was no time.

    Returns:
        What ``stored_class`` returns.
    """
    kept = kept_classes(run).get(name)
    plain = confirmed.get(PLAIN_SETTING.key)
    now = 0 if plain is None else len(plain.samples)
    if kept is None or kept.prompts <= 2 * now:
        return None
    if confirmed:
        run.warn(
            f"{name}: confirmed on {now} prompts now, but on {kept.prompts} before; "
            "what was confirmed then stays"
        )
    found = ClassResult(
        name,
        Choice(name, PLAIN),
        tuple(kept.profiles),
        tried=[
            Tried.of(trial)
            for arm in arms
            if arm.prompt_class == name
            for trial in arm.trials
        ],
        reused=name in held_out.reused,
        predicted=run.store.record(run.id, predicted_key(name)) or {},
    )
    return found, dict(kept.record)
