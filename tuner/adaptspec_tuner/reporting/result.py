"""What a tuning run found: the one model behind its table, JSON and page.

A tune fills it as it goes; ``stored.py`` reads it back from a profile store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from adaptspec.params import Scalar
from adaptspec.profile import (
    EVERY_CLASS,
    PLAIN,
    SPEED,
    Environment,
    Measurement,
    Profile,
    Trial,
)
from adaptspec.selector import FEWEST_PROMPTS, Choice
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.reporting.usage import Usage


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

    @classmethod
    def of(cls, trial: Trial) -> Tried:
        """One that was measured."""
        ratio = trial.detail.get("ratio")
        return cls(
            trial.strategy,
            trial.number,
            dict(trial.params),
            trial.state,
            None if ratio is None else float(ratio),
            trial.detail.get("error"),
        )


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
class Row:
    """One confirmed setting of one class.

    Args:
        predicted: The ratio that the replay promised on the same prompts.
        positions: Share of candidates accepted by depth from 1, where there were any.
    """

    profile: Profile
    winner: bool
    predicted: float | None = None
    positions: Sequence[float] = ()

    @property
    def strategy(self) -> str:
        """Its strategy or baseline."""
        return self.profile.strategy

    @property
    def measurement(self) -> Measurement:
        """What was measured on held-out prompts."""
        return self.profile.measurement

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the ratio to plain decoding, None if unknown."""
        m = self.measurement
        if m.interval_low is None or m.interval_high is None:
            return None
        return m.interval_low, m.interval_high

    @property
    def prediction_error(self) -> float | None:
        """predicted / measured - 1."""
        ratio = self.measurement.ratio
        if self.predicted is None or ratio <= 0:
            return None
        return self.predicted / ratio - 1

    @property
    def identical(self) -> bool:
        """Whether its outputs were plain decoding's on every prompt."""
        return self.measurement.identical == self.measurement.prompts

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "strategy": self.strategy,
            "params": dict(self.profile.params),
            "winner": self.winner,
            "baseline": self.profile.baseline,
            "lossless": self.profile.lossless,
            "predicted": self.predicted,
            "prediction_error": self.prediction_error,
            "positions": list(self.positions),
            **asdict(self.measurement),
        }


@dataclass(frozen=True)
class ClassResult:
    """One class: the choice, and everything confirmed (plain decoding first).

    Args:
        tried: The search's trials.
        reused: Its only prompt was tuned on and reported on.
        predicted: Setting key -> the ratio that the replay promised on its prompts.
        positions: Setting key -> share of candidates accepted by depth from 1.
    """

    name: str
    choice: Choice
    profiles: tuple[Profile, ...]
    tried: Sequence[Tried] = ()
    reused: bool = False
    predicted: Mapping[str, float] = field(default_factory=dict)
    positions: Mapping[str, Sequence[float]] = field(default_factory=dict)
    oracle: Oracle | None = None

    @property
    def rows(self) -> list[Row]:
        """The winner, then the others by their ratio to plain decoding."""
        rows = [self._row(profile) for profile in self.profiles]
        return sorted(rows, key=lambda row: (not row.winner, -row.measurement.ratio))

    def _row(self, profile: Profile) -> Row:
        won = (
            not profile.baseline
            and profile.strategy == self.choice.strategy
            and dict(profile.params) == dict(self.choice.params)
        )
        key = Setting(profile.strategy, profile.params).key
        predicted = None if profile.baseline else self.predicted.get(key)
        return Row(profile, won, predicted, self.positions.get(key, ()))

    @property
    def winner(self) -> Row | None:
        """The row of the choice; None where what is chosen wasn't confirmed here."""
        return next((row for row in self.rows if row.winner), None)

    @property
    def trials(self) -> dict[str, int]:
        """How many settings of each strategy were measured in the search."""
        counts: dict[str, int] = {}
        for trial in self.tried:
            if not trial.replayed:
                counts[trial.strategy] = counts.get(trial.strategy, 0) + 1
        return counts

    @property
    def prediction_errors(self) -> list[tuple[float, bool]]:
        """Of each predicted setting: predicted / measured - 1, and whether its outputs
        were plain decoding's on every prompt."""
        return [
            (row.prediction_error, row.identical)
            for row in self.rows
            if row.prediction_error is not None
        ]

    @property
    def few(self) -> bool:
        """Whether it was confirmed on too few prompts for a strategy to be chosen."""
        return all(p.measurement.prompts < FEWEST_PROMPTS for p in self.profiles)

    @property
    def saved(self) -> float:
        """Seconds saved a token by the choice, 0 for plain decoding."""
        plain = [p for p in self.profiles if p.strategy == PLAIN and not p.baseline]
        won = [row.profile for row in self.rows if row.winner]
        speeds = [p.measurement.tokens_per_second for p in [*plain, *won]]
        if self.choice.strategy == PLAIN or len(speeds) != 2 or not all(speeds):
            return 0.0
        return 1 / speeds[0] - 1 / speeds[1]

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        oracle = self.oracle and {**asdict(self.oracle), "gap": self.oracle.gap}
        return {
            "class": self.name,
            "winner": self.choice.strategy,
            "params": dict(self.choice.params),
            "reason": self.choice.reason,
            "reused": self.reused,
            "trials": self.trials,
            "saved": self.saved,
            "results": [row.as_json() for row in self.rows],
            "tried": [asdict(trial) for trial in self.tried],
            "oracle": oracle,
        }


@dataclass(frozen=True)
class TuneResult:
    """A tuning run's outcome.

    Args:
        spent: Part -> seconds.
        worked: Trials, by a process that was a worker only.
        created: When it was stored, as ISO 8601.
        costs: ``target`` and ``draft`` -> contexts, rows and milliseconds
            ``[contexts][rows]``; empty if none were measured.
        classifier: How well a prompt's class is told from its text: the fields of
            :class:`~adaptspec.classes.classifier.Evidence`, and ``told_in_words``;
            None without two classes.
        usage: What was tuned, as it was asked for; None where that isn't known.
        defaults: Strategy, baseline or an engine's method -> its parameters' defaults,
            of those at hand.
    """

    run: str
    environment: Environment
    workload: str
    db: str
    classes: list[ClassResult]
    notes: list[str]
    unavailable: Mapping[str, str]
    spent: dict[str, float] = field(default_factory=dict)
    worked: int | None = None
    created: str | None = None
    costs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    classifier: Mapping[str, Any] | None = None
    usage: Usage | None = None
    defaults: Mapping[str, Mapping[str, Scalar]] = field(default_factory=dict)

    @property
    def named(self) -> list[ClassResult]:
        """The workload's classes, without the result over all of them."""
        return [found for found in self.classes if found.name != EVERY_CLASS]

    @property
    def pooled(self) -> ClassResult | None:
        """The result over all classes, where there is one."""
        return next((c for c in self.classes if c.name == EVERY_CLASS), None)

    def changed(self, strategy: str, params: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Those of its parameters that aren't the strategy's defaults."""
        usual = self.defaults.get(strategy, {})
        return {
            name: value
            for name, value in params.items()
            if name not in usual or usual[name] != value
        }

    @property
    def objective(self) -> str:
        """What its ratios are about."""
        profiles = [p for found in self.classes for p in found.profiles]
        return profiles[0].measurement.objective if profiles else SPEED

    @property
    def prediction_errors(self) -> list[tuple[float, bool]]:
        """Those of all classes."""
        return [pair for found in self.named for pair in found.prediction_errors]

    @property
    def prediction_error(self) -> float | None:
        """Median over settings of abs(predicted / measured - 1)."""
        errors = [abs(error) for error, _ in self.prediction_errors]
        return median(errors) if errors else None

    @property
    def break_even(self) -> float | None:
        """Tokens of use that repay tuning; None if nothing does."""
        return break_even(sum(self.spent.values()), self.named)

    def own_break_even(self, found: ClassResult) -> float | None:
        """Tokens of one class that repay its equal part of the tuning."""
        if found.name == EVERY_CLASS:
            return None
        return break_even(sum(self.spent.values()) / len(self.named), [found])

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "run": self.run,
            "environment": asdict(self.environment),
            "workload": self.workload,
            "db": self.db,
            "created": self.created,
            "objective": self.objective,
            "classes": [
                {
                    **found.as_json(),
                    "results": [
                        {
                            **row.as_json(),
                            "changed": self.changed(row.strategy, row.profile.params),
                        }
                        for row in found.rows
                    ],
                    "break_even": self.own_break_even(found),
                }
                for found in self.classes
            ],
            "unavailable": dict(self.unavailable),
            "notes": list(self.notes),
            "spent": dict(self.spent),
            "break_even": self.break_even,
            "prediction_error": self.prediction_error,
            "costs": dict(self.costs),
            "classifier": self.classifier,
            "worked": self.worked,
        }


def told_errors(errors: Iterable[tuple[float, bool]]) -> str:
    """How good predictions were, in words; empty without any.

    Args:
        errors: As of :attr:`ClassResult.prediction_errors`.
    """
    known = list(errors)
    if not known:
        return ""
    text = (
        f"its predictions of {len(known)} confirmed settings were off by "
        f"{median(abs(error) for error, _ in known):.1%} (median)"
    )
    same = [abs(error) for error, identical in known if identical]
    if same and len(same) < len(known):
        text += (
            f", those of the {len(same)} whose outputs were identical on every prompt "
            f"by {median(same):.1%}"
        )
    return text


def break_even(seconds: float, classes: Sequence[ClassResult]) -> float | None:
    """Generated tokens after which the time saved equals ``seconds``.

    The classes in equal parts. None where nothing was spent or is saved.
    """
    saved = sum(found.saved for found in classes)
    return seconds * len(classes) / saved if seconds and saved > 0 else None
