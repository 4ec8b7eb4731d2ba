"""All figures of one tuning run, from the store: what each form of the report shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from adaptspec.classes.classifier import Classifier
from adaptspec.errors import AdaptSpecError, ProfileStoreError
from adaptspec.model.hardware_costs import ForwardCosts, stored_costs
from adaptspec.params import Scalar
from adaptspec.profile import PLAIN, Environment, Profile, ProfileStore, Trial
from adaptspec.selector import select
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.records import (
    CLASSIFIER,
    SPENT,
    confirmed_key,
    predicted_key,
    replayed_key,
)
from adaptspec_tuner.reporting.result import ClassResult, break_even


@dataclass(frozen=True)
class Row:
    """One confirmed setting of one class.

    Args:
        interval: 95% bootstrap interval of ``ratio``, None if unknown.
        predicted: The ratio that the replay promised on the same prompts.
        prediction_error: predicted / measured - 1.
        positions: Share of candidates accepted by depth from 1, where there were any.
    """

    strategy: str
    params: Mapping[str, Scalar]
    winner: bool
    baseline: bool
    lossless: bool
    ratio: float
    interval: tuple[float, float] | None
    tokens_per_second: float
    latency_p95: float | None
    peak_memory: int | None
    tokens_per_forward: float
    acceptance: float
    prompts: int
    identical: int
    near_ties: int
    predicted: float | None
    prediction_error: float | None
    positions: Sequence[float]


@dataclass(frozen=True)
class Tried:
    """One trial of the search; ``ratio`` is its speed relative to plain decoding.

    Args:
        replayed: Whether it was predicted against recorded answers, not measured.
    """

    strategy: str
    number: int
    params: Mapping[str, Scalar]
    state: str
    ratio: float | None
    error: str | None
    replayed: bool = False


@dataclass(frozen=True)
class Oracle:
    """What choosing anew for every prompt would add: geometric means over prompts.

    Args:
        fixed: Ratio to plain decoding of the best one setting for all prompts.
        strategy: Its strategy.
        best: Ratio of the best setting of each prompt, plain decoding among them.
    """

    fixed: float
    strategy: str
    best: float

    @property
    def gap(self) -> float:
        """How much faster choosing by prompt would be, e.g. 0.05 for 5%."""
        return self.best / self.fixed - 1


@dataclass(frozen=True)
class ClassReport:
    """One class of prompts.

    Args:
        saved: Seconds saved a token by the choice, 0 for plain decoding.
        break_even: Tokens of this class that repay its part of the tuning, the classes
            in equal parts; None if nothing does.
    """

    name: str
    winner: str
    reason: str
    rows: Sequence[Row]
    trials: Sequence[Tried]
    oracle: Oracle | None
    saved: float
    break_even: float | None = None


@dataclass(frozen=True)
class Report:
    """One run.

    Args:
        costs: ``target`` and ``draft`` -> contexts, rows and milliseconds
            ``[contexts][rows]``; empty if none were measured.
        spent: Part -> seconds.
        break_even: Tokens of use that repay tuning, the classes in equal parts; None
            if nothing does.
        prediction_error: Median over settings of |predicted / measured - 1|.
        predictions: Of each setting that was predicted: predicted / measured - 1, and
            whether its outputs were plain decoding's on every prompt.
        classifier: Of discovered classes: ``source`` (text, states), ``seconds`` that
            finding a prompt's class takes, ``classes`` in words; None if declared.
    """

    run: str
    environment: Environment
    workload: str
    created: str
    objective: str
    classes: Sequence[ClassReport]
    costs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    spent: Mapping[str, float] = field(default_factory=dict)
    break_even: float | None = None
    prediction_error: float | None = None
    predictions: Sequence[tuple[float, bool]] = ()
    classifier: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        document = asdict(self)
        for found, data in zip(self.classes, document["classes"], strict=True):
            if found.oracle is not None:
                data["oracle"]["gap"] = found.oracle.gap
        return document


def build(store: ProfileStore, run: str | None = None) -> Report:
    """The report of ``run``, by default of the newest.

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
    names = sorted({p.prompt_class for p in profiles})
    classes = [
        _class(
            name,
            [p for p in profiles if p.prompt_class == name],
            [
                *(_tried(t) for t in trials if t.prompt_class == name),
                *_replayed(store, run, name),
            ],
            store.record(run, predicted_key(name)) or {},
            store.record(run, confirmed_key(name)) or {},
        )
        for name in names
    ]
    spent = dict((store.record(run, SPENT) or {}).get("parts", {}))
    part = sum(spent.values()) / len(classes)
    classes = [
        replace(
            found, break_even=part / found.saved if part and found.saved > 0 else None
        )
        for found in classes
    ]
    newest = profiles[0]
    results = [
        ClassResult(
            name,
            select(of_class, newest.environment, name),
            tuple(of_class),
        )
        for name in names
        if (of_class := [p for p in profiles if p.prompt_class == name])
    ]
    errors = [
        (row.prediction_error, row.identical == row.prompts)
        for found in classes
        for row in found.rows
        if row.prediction_error is not None
    ]
    return Report(
        run=run,
        environment=newest.environment,
        workload=newest.workload_name,
        created=newest.created.isoformat(timespec="seconds"),
        objective=newest.measurement.objective,
        classes=classes,
        costs=_costs(store, newest.environment),
        spent=spent,
        break_even=break_even(sum(spent.values()), results) if spent else None,
        prediction_error=median(abs(e) for e, _ in errors) if errors else None,
        predictions=errors,
        classifier=_classes_told(store, run),
    )


def _class(
    name: str,
    profiles: Sequence[Profile],
    trials: Sequence[Tried],
    predicted: Mapping[str, float],
    confirmed: Mapping[str, Any],
) -> ClassReport:
    choice = select(profiles, profiles[0].environment, name)
    found = ClassResult(name, choice, tuple(profiles))
    plain = [p for p in profiles if p.strategy == PLAIN and not p.baseline]
    won = [p for p in profiles if found.won(p)]
    speeds = [p.measurement.tokens_per_second for p in [*plain, *won]]
    saved = 1 / speeds[0] - 1 / speeds[1] if len(speeds) == 2 and all(speeds) else 0.0
    return ClassReport(
        name,
        choice.strategy,
        choice.reason,
        [_row(p, found, predicted, confirmed) for p in found.ranked],
        trials,
        _oracle(confirmed.get("prompts", {}), profiles),
        0.0 if choice.strategy == PLAIN else saved,
    )


def _row(
    profile: Profile,
    found: ClassResult,
    predicted: Mapping[str, float],
    confirmed: Mapping[str, Any],
) -> Row:
    m = profile.measurement
    key = _key(profile)
    known = m.interval_low is not None and m.interval_high is not None
    told = None if profile.baseline else predicted.get(key)
    return Row(
        strategy=profile.strategy,
        params=dict(profile.params),
        winner=found.won(profile),
        baseline=profile.baseline,
        lossless=profile.lossless,
        ratio=m.ratio,
        interval=(m.interval_low or 0.0, m.interval_high or 0.0) if known else None,
        tokens_per_second=m.tokens_per_second,
        latency_p95=m.latency_p95,
        peak_memory=m.peak_memory,
        tokens_per_forward=m.tokens_per_forward,
        acceptance=m.acceptance,
        prompts=m.prompts,
        identical=m.identical,
        near_ties=m.near_ties,
        predicted=told,
        prediction_error=told / m.ratio - 1 if told is not None and m.ratio else None,
        positions=[
            accepted / offered
            for accepted, offered in confirmed.get("positions", {}).get(key, ())
            if offered
        ],
    )


def _classes_told(store: ProfileStore, run: str) -> dict[str, Any] | None:
    record = store.record(run, CLASSIFIER)
    try:
        found = None if record is None else Classifier.from_json(record)
    except AdaptSpecError:  # another version's
        found = None
    if found is None:
        return None
    return {
        "source": found.source,
        "seconds": found.seconds,
        "classes": found.describe(),
    }


def _tried(trial: Trial) -> Tried:
    ratio = trial.detail.get("ratio")
    return Tried(
        trial.strategy,
        trial.number,
        dict(trial.params),
        trial.state,
        None if ratio is None else float(ratio),
        trial.detail.get("error"),
    )


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
