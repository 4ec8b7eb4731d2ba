"""The last phase of a tune: decides on all confirmed classes and stores the choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptspec.errors import ProfileStoreError
from adaptspec.profile import EVERY_CLASS, PLAIN, ClassChoice, Profile
from adaptspec.selector import Choice, select
from adaptspec_tuner.confirming.choices import decide_classes
from adaptspec_tuner.records import confirmed_key
from adaptspec_tuner.reporting.result import ClassResult
from adaptspec_tuner.tuning_run import TuningRun


def decided(
    run: TuningRun,
    classes: Sequence[ClassResult],
    records: Mapping[str, Mapping[str, Any]],
) -> list[ClassResult]:
    """Decide on all classes of the run, store what is decided, and return them with it.

    With several classes the result over all of them comes last.

    Args:
        classes: What this process confirmed; a run that is continued confirmed more.
        records: Class -> what was confirmed of it, as it is recorded.
    """
    given = run.given
    confirmed: dict[str, list[Profile]] = {}
    known: list[ClassChoice] = []
    records = dict(records)
    try:
        for profile in run.store.profiles(run=run.id):
            confirmed.setdefault(profile.prompt_class, []).append(profile)
        known = run.store.choices(model=run.environment.model)
        for name in confirmed.keys() - records.keys():
            records[name] = run.store.record(run.id, confirmed_key(name)) or {}
    except ProfileStoreError as error:
        run.unstored = run.unstored or error
    named = [found for found in classes if found.name != EVERY_CLASS]
    confirmed |= {found.name: list(found.profiles) for found in named}
    confirmed.pop(EVERY_CLASS, None)
    choices, profiles = decide_classes(
        confirmed,
        records,
        [cls.name for cls in given.strategies],
        [cls.name for cls in given.strategies if not cls.lossless],
        given.needs,
    )
    run.keep(lambda: run.store.add_profiles(profiles))
    run.keep(lambda: run.store.put_choices(choices))
    pinned = {choice.run for choice in known if choice.pinned}
    choices = [replace(choice, pinned=choice.run in pinned) for choice in choices]
    choices += [choice for choice in known if choice.run != run.id]
    if len(confirmed) > 1:
        named.append(ClassResult(EVERY_CLASS, Choice(EVERY_CLASS, PLAIN), ()))
    return [
        replace(
            found,
            choice=_chosen(run, choices, found.name),
            profiles=tuple(p for p in profiles if p.prompt_class == found.name),
        )
        for found in named
    ]


def _chosen(run: TuningRun, choices: Sequence[ClassChoice], name: str) -> Choice:
    """What ``adaptspec.load`` will choose for a class."""
    choice = select(choices, run.environment, name)
    if not choice.run or choice.run == run.id:
        return choice
    said = f"run {choice.run} has the better evidence: it stays (`adaptspec profiles"
    return replace(
        choice, reason=f"{choice.reason}; {said} pin {run.id}` takes this one)"
    )
