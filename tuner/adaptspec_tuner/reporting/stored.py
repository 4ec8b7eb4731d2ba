"""Reads what a tuning run found back from the profile store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from adaptspec.classes.classifier import Classifier
from adaptspec.errors import AdaptSpecError, ProfileStoreError
from adaptspec.model.hardware_costs import ForwardCosts, stored_costs
from adaptspec.model.rounding import output_note, stored_rounding
from adaptspec.profile import PLAIN, Environment, Profile, ProfileStore
from adaptspec.selector import Choice, select
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.records import (
    CLASSIFIER,
    DEFAULTS,
    SPENT,
    USAGE,
    confirmed_key,
    predicted_key,
    replayed_key,
)
from adaptspec_tuner.reporting.result import ClassResult, Oracle, Tried, TuneResult
from adaptspec_tuner.reporting.usage import Usage


def build(store: ProfileStore, run: str | None = None) -> TuneResult:
    """What ``run`` found, by default the newest.

    Raises:
        ProfileStoreError: if nothing was tuned, or not that run.
    """
    profiles = store.profiles(run=run)
    if not profiles:
        known = dict.fromkeys(p.run for p in store.profiles())
        if not known:
            raise ProfileStoreError(
                f"{store.url} holds no profiles; `adaptspec tune` measures some"
            )
        raise ProfileStoreError(
            f"{store.url} has no run {run!r}; it has {', '.join(known)}"
        )
    run = profiles[0].run
    profiles = [p for p in profiles if p.run == run]
    trials = store.trials(run)
    newest = profiles[0]
    choices = store.choices(run=run)
    usage = store.record(run, USAGE)
    rounding = stored_rounding(store, newest.environment)
    return TuneResult(
        run=run,
        environment=newest.environment,
        workload=newest.workload_name,
        db=store.url,
        classes=[
            _class(
                name,
                select(choices, newest.environment, name),
                _confirmed_last([p for p in profiles if p.prompt_class == name]),
                [
                    *(Tried.of(t) for t in trials if t.prompt_class == name),
                    *_replayed(store, run, name),
                ],
                store.record(run, predicted_key(name)) or {},
                store.record(run, confirmed_key(name)) or {},
            )
            for name in sorted({p.prompt_class for p in profiles})
        ],
        notes=[] if rounding is None else [output_note(rounding)],
        unavailable={},
        spent=dict((store.record(run, SPENT) or {}).get("parts", {})),
        created=newest.created.isoformat(timespec="seconds"),
        costs=_costs(store, newest.environment),
        classifier=_classes_told(store, run),
        usage=None if usage is None else Usage.from_json(usage),
        defaults=store.record(run, DEFAULTS) or {},
    )


def _confirmed_last(profiles: Sequence[Profile]) -> list[Profile]:
    """Those of a class's last confirmation, which have one time; what was confirmed
    before, of other strategies, wasn't decided on beside them."""
    newest = max(p.created for p in profiles)
    return [p for p in profiles if p.created == newest]


def _class(
    name: str,
    choice: Choice,
    profiles: Sequence[Profile],
    tried: Sequence[Tried],
    predicted: Mapping[str, float],
    confirmed: Mapping[str, Any],
) -> ClassResult:
    positions = {
        key: [accepted / offered for accepted, offered in found if offered]
        for key, found in confirmed.get("positions", {}).items()
    }
    return ClassResult(
        name,
        choice,
        tuple(profiles),
        tried,
        predicted=predicted,
        positions=positions,
        oracle=_oracle(confirmed.get("prompts", {}), profiles),
    )


def _classes_told(store: ProfileStore, run: str) -> dict[str, Any] | None:
    record = store.record(run, CLASSIFIER)
    try:
        found = None if record is None else Classifier.from_json(record)
    except AdaptSpecError:  # another version's
        found = None
    if found is None:
        return None
    return {**vars(found.evidence), "told_in_words": found.evidence.describe()}


def _replayed(store: ProfileStore, run: str, name: str) -> list[Tried]:
    """A class's trials without the target, of every strategy that was confirmed or
    measured; an older version kept none."""
    strategies = {p.strategy for p in store.profiles(run=run)} | {
        t.strategy for t in store.trials(run)
    }
    return [
        Tried(
            strategy,
            trial["number"],
            trial["params"],
            trial["state"],
            trial["ratio"],
            trial.get("error"),
            replayed=True,
        )
        for strategy in sorted(strategies)
        for trial in (store.record(run, replayed_key(name, strategy)) or {}).get(
            "trials", ()
        )
    ]


def _oracle(
    prompts: Mapping[str, Mapping[str, Sequence[float]]], profiles: Sequence[Profile]
) -> Oracle | None:
    """Over the lossless settings of ours that were measured on every prompt."""
    ours = {_key(p): p for p in profiles if p.lossless and not p.baseline}
    plain = next((key for key, p in ours.items() if p.strategy == PLAIN), None)
    speeds = [
        {key: median(runs) for key, runs in found.items() if key in ours and runs}
        for found in prompts.values()
    ]
    # Of one prompt the best for each is the best for all.
    if (
        plain is None
        or len(speeds) < 2
        or not all(found.get(plain) for found in speeds)
    ):
        return None
    common = [key for key in ours if all(found.get(key) for found in speeds)]

    def mean(ratios: Sequence[float]) -> float:
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    fixed = {
        key: mean([found[key] / found[plain] for found in speeds]) for key in common
    }
    best = max(fixed, key=lambda key: fixed[key])
    most = mean([max(found[k] for k in common) / found[plain] for found in speeds])
    return Oracle(fixed[best], ours[best].strategy, most)


def _key(profile: Profile) -> str:
    return Setting(profile.strategy, profile.params).key


def _costs(store: ProfileStore, environment: Environment) -> dict[str, dict[str, Any]]:
    costs = stored_costs(store, environment)
    if costs is None:
        return {}

    def table(of: ForwardCosts) -> dict[str, Any]:
        return {
            "contexts": list(of.contexts),
            "rows": list(of.rows),
            "milliseconds": [[1e3 * value for value in line] for line in of.seconds],
        }

    found = {"target": table(costs.target)}
    if costs.draft is not None:
        found["draft"] = table(costs.draft)
    return found
