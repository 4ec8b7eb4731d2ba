"""The tables that a tune and a report print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptspec.cli.progress import minutes
from adaptspec.profile import LATENCY, PLAIN, Profile
from adaptspec.selector import FEWEST_PROMPTS
from adaptspec_tuner.reporting.result import (
    ClassResult,
    TuneResult,
    break_even,
    told_errors,
    told_ratio,
)

if TYPE_CHECKING:
    from rich.console import Console

    from adaptspec_tuner.reporting.data import ClassReport, Report, Row


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


def print_report(report: Report, console: Console) -> None:
    """Print the table of settings and what is said of the run."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(heading(report)))
    for column in ("class", "strategy", COLUMN[report.objective], "tokens/s"):
        table.add_column(column)
    for column in ("tokens/forward", "acceptance", "predicted", "identical"):
        table.add_column(column, justify="right")
    for found in report.classes:
        for number, row in enumerate(found.rows):
            table.add_row(
                Text(found.name if number == 0 else ""),
                Text(("> " if row.winner else "") + label(row)),
                ratio(row),
                f"{row.tokens_per_second:.1f}",
                f"{row.tokens_per_forward:.2f}",
                f"{row.acceptance:.0%}" if row.strategy != PLAIN else "-",
                predicted(row),
                identical(row),
                style="bold" if row.winner else None,
                end_section=number == len(found.rows) - 1,
            )
    console.print(table)
    say: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    for found in report.classes:
        console.print(f"{found.name}: {found.reason}", **say)
        if gap := oracle(found):
            console.print(f"    {gap}", **say)
        if text := repaid(found):
            console.print(f"    {text}", **say)
    for line in summary(report):
        console.print(line, **say)


COLUMN = {
    "speed": "x plain [95% interval]",
    LATENCY: "x plain in p95 latency [95% interval]",
}


def heading(report: Report) -> str:
    """Model, machine and workload."""
    place = report.environment
    beside = ", ".join(filter(None, (place.draft_name, place.heads_name)))
    draft = f" with {beside}" if beside else ""
    return (
        f"{place.model_name}{draft}, {place.dtype}, {place.device_name}, "
        f"{place.threads} threads, held-out prompts of {report.workload}"
    )


def label(row: Row) -> str:
    """The strategy's name with what must be known of it."""
    marks = " (baseline)" if row.baseline else ""
    return row.strategy + marks + ("" if row.lossless else " (NOT LOSSLESS)")


def ratio(row: Row) -> str:
    """With its interval, if that is known."""
    if row.interval is None:
        return f"{row.ratio:.2f}"
    return f"{row.ratio:.2f} [{row.interval[0]:.2f}..{row.interval[1]:.2f}]"


def predicted(row: Row) -> str:
    """The replay's ratio and how far off it was."""
    return told_ratio(row.predicted, row.ratio)


def identical(row: Row) -> str:
    """On how many prompts plain decoding's tokens came out."""
    ties = f" (+{row.near_ties} near ties)" if row.near_ties else ""
    return f"{row.identical}/{row.prompts}{ties}"


def oracle(found: ClassReport) -> str:
    """What choosing by prompt would add; empty where it isn't known."""
    if found.oracle is None:
        return ""
    return (
        f"one setting for all its prompts: {found.oracle.fixed:.2f}x "
        f"({found.oracle.strategy}); the best for each prompt: "
        f"{found.oracle.best:.2f}x ({found.oracle.gap:+.1%})"
    )


def repaid(found: ClassReport) -> str:
    """When this class alone repays its part of the tuning; empty where it doesn't."""
    if found.break_even is None:
        return ""
    return (
        f"its equal part of the tuning is repaid after {found.break_even:,.0f} tokens "
        "of this class"
    )


def summary(report: Report) -> list[str]:
    """Cost, break-even and how good the predictions were."""
    lines = []
    if report.spent:
        parts = ", ".join(f"{part} {minutes(s)}" for part, s in report.spent.items())
        lines.append(f"Tuning took {minutes(sum(report.spent.values()))} ({parts}).")
        lines.append(
            "Nothing was found that repays it."
            if report.break_even is None
            else f"It is repaid after {report.break_even:,.0f} tokens of use, the "
            "classes in equal parts."
        )
    else:
        lines.append("What tuning took was not recorded.")
    tried = [trial for found in report.classes for trial in found.trials]
    if replayed := sum(trial.replayed for trial in tried):
        lines.append(
            f"{len(tried) - replayed} settings were measured in the search, {replayed} "
            "replayed against recorded answers."
        )
    if said := told_errors(report.predictions):
        lines.append(f"Replay: {said}.")
        rows = [row for found in report.classes for row in found.rows]
        without = {
            row.strategy
            for row in rows
            if row.predicted is None and row.strategy != PLAIN and not row.baseline
        }
        if without:
            lines.append(
                f"Without a prediction: {', '.join(sorted(without))} (the record lacks "
                "what they read of the target, or time was up)."
            )
    if report.classifier is not None:
        lines.append(
            "The class of a prompt is found from its text in "
            f"{1e3 * report.classifier['seconds']:.2f} ms."
        )
    return lines
