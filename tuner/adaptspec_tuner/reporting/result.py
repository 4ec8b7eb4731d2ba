"""What a tuning run found, as a table and as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from adaptspec.profile import PLAIN, Environment, Profile
from adaptspec.selector import FEWEST_PROMPTS, Choice
from adaptspec_tuner.measuring.profiler import Setting

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ClassResult:
    """One class: the choice, and everything confirmed (plain decoding first).

    Args:
        reused: Its only prompt was tuned on and reported on.
        predicted: Setting key -> the ratio that the replay promised on its prompts.
    """

    name: str
    choice: Choice
    profiles: tuple[Profile, ...]
    trials: Mapping[str, int] = field(default_factory=dict)
    reused: bool = False
    predicted: Mapping[str, float] = field(default_factory=dict)

    def prediction(self, profile: Profile) -> float | None:
        """The ratio that was predicted of a setting, None if it wasn't."""
        if profile.baseline:
            return None
        return self.predicted.get(Setting(profile.strategy, profile.params).key)

    @property
    def prediction_errors(self) -> list[tuple[float, bool]]:
        """Of each predicted setting: predicted / measured - 1, and whether its outputs
        were plain decoding's on every prompt."""
        return [
            (told / p.measurement.ratio - 1, p.measurement.identical == count)
            for p in self.profiles
            if (told := self.prediction(p)) is not None
            and p.measurement.ratio > 0
            and (count := p.measurement.prompts)
        ]

    @property
    def ranked(self) -> list[Profile]:
        """The winner, then the others by their ratio to plain decoding."""
        return sorted(
            self.profiles,
            key=lambda p: (not self.won(p), -p.measurement.ratio),
        )

    @property
    def few(self) -> bool:
        """Whether it was confirmed on too few prompts for a strategy to be chosen."""
        return all(p.measurement.prompts < FEWEST_PROMPTS for p in self.profiles)

    def won(self, profile: Profile) -> bool:
        """Whether ``profile`` is the winner."""
        return not profile.baseline and profile.strategy == self.choice.strategy


@dataclass(frozen=True)
class TuneResult:
    """A tuning run's outcome."""

    run: str
    environment: Environment
    workload: str
    db: str
    classes: list[ClassResult]
    notes: list[str]
    unavailable: Mapping[str, str]
    spent: dict[str, float] = field(default_factory=dict)  # part -> seconds
    worked: int | None = None  # trials, by a process that was a worker only

    def as_json(self) -> dict[str, Any]:
        """The table as data."""
        return {
            "run": self.run,
            "environment": asdict(self.environment),
            "workload": self.workload,
            "db": self.db,
            "classes": [_class_json(result) for result in self.classes],
            "unavailable": dict(self.unavailable),
            "notes": list(self.notes),
            "spent": dict(self.spent),
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


def told_ratio(predicted: float | None, measured: float) -> str:
    """A predicted ratio and how far off it was."""
    if predicted is None:
        return "-"
    off = f" ({predicted / measured - 1:+.1%})" if measured > 0 else ""
    return f"{predicted:.2f}{off}"


def break_even(seconds: float, classes: Sequence[ClassResult]) -> float | None:
    """Generated tokens after which the time saved equals ``seconds``.

    The classes in equal parts. None where nothing is saved.
    """
    saved = []
    for found in classes:
        plain = [p for p in found.profiles if p.strategy == PLAIN and not p.baseline]
        won = [p for p in found.profiles if found.won(p)]
        speeds = [p.measurement.tokens_per_second for p in [*plain, *won]]
        if len(speeds) == 2 and all(speeds) and found.choice.strategy != PLAIN:
            saved.append(1 / speeds[0] - 1 / speeds[1])
        else:
            saved.append(0.0)
    total = sum(saved)
    return seconds * len(saved) / total if total > 0 else None


def _class_json(found: ClassResult) -> dict[str, Any]:
    return {
        "class": found.name,
        "winner": found.choice.strategy,
        "params": dict(found.choice.params),
        "reason": found.choice.reason,
        "reused": found.reused,
        "trials": dict(found.trials),
        "results": [
            {
                "strategy": profile.strategy,
                "params": dict(profile.params),
                "winner": found.won(profile),
                "baseline": profile.baseline,
                "lossless": profile.lossless,
                "predicted": found.prediction(profile),
                **asdict(profile.measurement),
            }
            for profile in found.ranked
        ],
    }
