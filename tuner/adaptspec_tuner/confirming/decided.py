"""The last phase of a tune: decides on all confirmed classes and stores the choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptspec.errors import ProfileStoreError
from adaptspec.profile import EVERY_CLASS, PLAIN, ClassChoice, Profile, Trial
from adaptspec.selector import Choice, select
from adaptspec_tuner.confirming.choices import decide_classes
from adaptspec_tuner.confirming.kept import Kept, kept_classes
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
    kept: dict[str, Kept] = {}
    known: list[ClassChoice] = []
    trials: list[Trial] = []
    try:
        kept = kept_classes(run)
        known = run.store.choices(model=run.environment.model)
        trials = run.store.trials(run.id)
    except ProfileStoreError as error:
        run.unstored = run.unstored or error
    named = [found for found in classes if found.name != EVERY_CLASS]
    confirmed = {name: found.profiles for name, found in kept.items()}
    confirmed |= {found.name: found.profiles for found in named}
    choices, profiles = decide_classes(
        confirmed,
        {name: found.record for name, found in kept.items()} | dict(records),
        _tried(run, confirmed, trials),
        [cls.name for cls in given.strategies if not cls.lossless],
        given.needs,
    )
    # Before they are stored: a pinned run is pinned with the classes that join it.
    pinned = any(choice.pinned for choice in known if choice.run == run.id)
    choices = [replace(choice, pinned=pinned) for choice in choices]
    run.keep(lambda: run.store.add_profiles(profiles))
    run.keep(lambda: run.store.put_choices(choices))
    new = {choice.prompt_class for choice in choices}
    known = [c for c in known if c.run != run.id or c.prompt_class not in new]
    if len(confirmed) > 1:
        named.append(ClassResult(EVERY_CLASS, Choice(EVERY_CLASS, PLAIN), ()))
    return [
        replace(
            found,
            choice=_chosen(run, [*choices, *known], found.name),
            profiles=tuple(p for p in profiles if p.prompt_class == found.name),
        )
        for found in named
    ]


def _tried(
    run: TuningRun,
    confirmed: Mapping[str, Sequence[Profile]],
    trials: Sequence[Trial],
) -> dict[str, set[str]]:
    """Class -> strategies that were tried in it, whatever came of it."""
    names = {cls.name for cls in run.given.strategies}
    tried = {
        name: {p.strategy for p in profiles if not p.baseline}
        for name, profiles in confirmed.items()
    }
    for trial in trials:
        if trial.prompt_class in tried:
            tried[trial.prompt_class].add(trial.strategy)
    return {name: found & names for name, found in tried.items()}


def _chosen(run: TuningRun, choices: Sequence[ClassChoice], name: str) -> Choice:
    """What ``adaptspec.load`` will choose for a class."""
    choice = select(choices, run.environment, name)
    if not choice.run or choice.run == run.id:
        return choice
    said = f"run {choice.run} has the better evidence: it stays (`adaptspec profiles"
    return replace(
        choice, reason=f"{choice.reason}; {said} pin {run.id}` takes this one)"
    )
