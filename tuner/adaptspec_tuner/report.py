"""What a tuning run found, as a table and as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from adaptspec.profile import PLAIN, Environment, Profile
from adaptspec.selector import FEWEST_PROMPTS, Choice
from adaptspec_tuner.profiler import Setting
from adaptspec_tuner.progress import minutes

if TYPE_CHECKING:
    from rich.console import Console


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


def print_result(result: TuneResult, console: Console) -> None:
    """Print the table, what couldn't run, and how to use the result."""
    from rich.table import Table

    place = result.environment
    table = Table(
        title=f"{place.model_name}, {place.dtype}, {place.device_name}, "
        f"{place.threads} threads, held-out prompts of {result.workload}",
    )
    table.add_column("class")
    table.add_column("strategy")
    table.add_column("tokens/s [quartiles]", justify="right")
    table.add_column("x plain [95% interval]", justify="right")
    table.add_column("p95 ms/token", justify="right")
    table.add_column("tokens/forward", justify="right")
    table.add_column("predicted", justify="right")
    table.add_column("identical", justify="right")
    for found in result.classes:
        for rank, profile in enumerate(found.ranked):
            table.add_row(
                found.name + ("*" if found.reused else "") if rank == 0 else "",
                _described(found, profile),
                *_figures(profile, found.prediction(profile)),
                style="bold" if found.won(profile) else None,
                end_section=rank == len(found.profiles) - 1,
            )
    console.print(table)
    say = dict(markup=False, highlight=False, soft_wrap=True)
    if any(found.reused for found in result.classes):
        console.print("* one prompt only: reported on what it was tuned on", **say)  # type: ignore[arg-type]
    if few := [found.name for found in result.classes if found.few]:
        console.print(
            f"too few held-out prompts: {', '.join(few)}: a strategy is chosen on "
            f"{FEWEST_PROMPTS} or more, so give {2 * FEWEST_PROMPTS} prompts a class "
            "or more, half are held out, and a budget that confirms them",
            **say,  # type: ignore[arg-type]
        )
    for name, reason in result.unavailable.items():
        console.print(f"not run: {name}: {reason}", **say)  # type: ignore[arg-type]
    if result.classes and result.spent:
        seconds = sum(result.spent.values())
        tokens = break_even(seconds, result.classes)
        repaid = (
            "nothing was found that repays it"
            if tokens is None
            else f"repaid after {tokens:,.0f} tokens of use, the classes in equal parts"
        )
        console.print(f"Tuning took {minutes(seconds)}: {repaid}.", **say)  # type: ignore[arg-type]
    if result.classes:
        first = result.classes[0].name
        console.print(
            f"Stored in {result.db}. From Python: "
            "adaptspec.load(MODEL).generate(PROMPT, "
            f"prompt_class={first!r})",
            **say,  # type: ignore[arg-type]
        )


def _described(found: ClassResult, profile: Profile) -> str:
    name = profile.strategy
    if name == PLAIN:
        name += " (plain decoding)"
    if profile.baseline:
        name += " (baseline)"
    if not profile.lossless:
        name += " (NOT LOSSLESS)"
    params = " ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in profile.params.items()
    )
    head = f"> {name}" if found.won(profile) else name
    return f"{head}\n{params}" if params else head


def _figures(profile: Profile, predicted: float | None) -> tuple[str, ...]:
    m = profile.measurement
    ties = f" (+{m.near_ties} near ties)" if m.near_ties else ""
    return (
        f"{m.tokens_per_second:.1f} "
        f"[{m.tokens_per_second_low:.1f}..{m.tokens_per_second_high:.1f}]",
        f"{m.ratio:.2f}"
        + (
            ""
            if m.interval_low is None or m.interval_high is None
            else f" [{m.interval_low:.2f}..{m.interval_high:.2f}]"
        ),
        "-" if m.latency_p95 is None else f"{m.latency_p95:.1f}",
        f"{m.tokens_per_forward:.2f}",
        told_ratio(predicted, m.ratio),
        f"{m.identical}/{m.prompts}{ties}",
    )


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
