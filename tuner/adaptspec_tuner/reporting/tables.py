"""A tuning run in words: the table that is printed, and the lines below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adaptspec.cli.progress import minutes
from adaptspec.profile import LATENCY, PLAIN
from adaptspec.selector import FEWEST_PROMPTS
from adaptspec_tuner.reporting.result import told_errors

if TYPE_CHECKING:
    from rich.console import Console

    from adaptspec_tuner.reporting.result import ClassResult, Row, TuneResult


def print_result(result: TuneResult, console: Console) -> None:
    """Print the table of settings, what is said of the run, and how to use it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(heading(result)))
    table.add_column("class")
    table.add_column("strategy")
    table.add_column(Text("tokens/s [quartiles]"), justify="right")
    table.add_column(Text(COLUMN[result.objective]), justify="right")
    for column in ("p95 ms/token", "tokens/forward", "predicted", "identical"):
        table.add_column(column, justify="right")
    for found in result.classes:
        rows = found.rows
        for number, row in enumerate(rows):
            m = row.measurement
            name = found.name + ("*" if found.reused else "")
            table.add_row(
                Text(name if number == 0 else ""),
                Text(("> " if row.winner else "") + described(row)),
                f"{m.tokens_per_second:.1f} "
                f"[{m.tokens_per_second_low:.1f}..{m.tokens_per_second_high:.1f}]",
                ratio(row),
                "-" if m.latency_p95 is None else f"{m.latency_p95:.1f}",
                f"{m.tokens_per_forward:.2f}",
                predicted(row),
                identical(row),
                style="bold" if row.winner else None,
                end_section=number == len(rows) - 1,
            )
    console.print(table)
    for line in said(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def said(result: TuneResult) -> list[str]:
    """What the table can't show, and how to use the result."""
    lines = []
    if any(found.reused for found in result.classes):
        lines.append("* one prompt only: reported on what it was tuned on")
    if few := [found.name for found in result.classes if found.few]:
        lines.append(
            f"too few held-out prompts: {', '.join(few)}: a strategy is chosen on "
            f"{FEWEST_PROMPTS} or more, so give {2 * FEWEST_PROMPTS} prompts a class "
            "or more, half are held out, and a budget that confirms them"
        )
    for found in result.classes:
        lines.append(f"{found.name}: {found.choice.reason}")
        more = (oracle(found), repaid(result, found))
        lines.extend(f"    {text}" for text in more if text)
    for name, reason in result.unavailable.items():
        lines.append(f"not run: {name}: {reason}")
    if result.classes:
        lines.extend(summary(result))
        lines.append(
            f"Stored in {result.db}. From Python: "
            "adaptspec.load(MODEL).generate(PROMPT, "
            f"prompt_class={result.classes[0].name!r})"
        )
    return lines


COLUMN = {
    "speed": "x plain [95% interval]",
    LATENCY: "x plain in p95 latency [95% interval]",
}


def heading(result: TuneResult) -> str:
    """Model, machine and workload."""
    place = result.environment
    beside = ", ".join(filter(None, (place.draft_name, place.heads_name)))
    draft = f" with {beside}" if beside else ""
    return (
        f"{place.model_name}{draft}, {place.dtype}, {place.device_name}, "
        f"{place.threads} threads, held-out prompts of {result.workload}"
    )


def label(row: Row) -> str:
    """The strategy's name with what must be known of it."""
    marks = " (baseline)" if row.profile.baseline else ""
    return row.strategy + marks + ("" if row.profile.lossless else " (NOT LOSSLESS)")


def parameters(params: Mapping[str, object]) -> str:
    """Names and values, floats shortened."""
    return " ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in params.items()
    )


def described(row: Row) -> str:
    """Its label, and its parameters on a line of their own."""
    name = label(row) + (" (plain decoding)" if row.strategy == PLAIN else "")
    params = parameters(row.profile.params)
    return f"{name}\n{params}" if params else name


def ratio(row: Row) -> str:
    """With its interval, if that is known."""
    if row.interval is None:
        return f"{row.measurement.ratio:.2f}"
    low, high = row.interval
    return f"{row.measurement.ratio:.2f} [{low:.2f}..{high:.2f}]"


def predicted(row: Row) -> str:
    """The replay's ratio and how far off it was."""
    if row.predicted is None:
        return "-"
    error = row.prediction_error
    return f"{row.predicted:.2f}" + ("" if error is None else f" ({error:+.1%})")


def identical(row: Row) -> str:
    """On how many prompts plain decoding's tokens came out."""
    m = row.measurement
    ties = f" (+{m.near_ties} near ties)" if m.near_ties else ""
    return f"{m.identical}/{m.prompts}{ties}"


def oracle(found: ClassResult) -> str:
    """What choosing by prompt would add; empty where it isn't known."""
    if found.oracle is None:
        return ""
    return (
        f"one setting for all its prompts: {found.oracle.fixed:.2f}x "
        f"({found.oracle.strategy}); the best for each prompt: "
        f"{found.oracle.best:.2f}x ({found.oracle.gap:+.1%})"
    )


def repaid(result: TuneResult, found: ClassResult) -> str:
    """When this class alone repays its part of the tuning; empty where it doesn't."""
    tokens = result.own_break_even(found)
    if tokens is None:
        return ""
    return (
        f"its equal part of the tuning is repaid after {tokens:,.0f} tokens "
        "of this class"
    )


def summary(result: TuneResult) -> list[str]:
    """Cost, break-even and how good the predictions were."""
    lines = []
    if result.spent:
        parts = ", ".join(f"{part} {minutes(s)}" for part, s in result.spent.items())
        lines.append(f"Tuning took {minutes(sum(result.spent.values()))} ({parts}).")
        lines.append(
            "Nothing was found that repays it."
            if result.break_even is None
            else f"It is repaid after {result.break_even:,.0f} tokens of use, the "
            "classes in equal parts."
        )
    else:
        lines.append("What tuning took was not recorded.")
    tried = [trial for found in result.classes for trial in found.tried]
    if replayed := sum(trial.replayed for trial in tried):
        lines.append(
            f"{len(tried) - replayed} settings were measured in the search, {replayed} "
            "replayed against recorded answers."
        )
    if told := told_errors(result.prediction_errors):
        lines.append(f"Replay: {told}.")
        rows = [row for found in result.classes for row in found.rows]
        without = {
            row.strategy
            for row in rows
            if row.predicted is None
            and row.strategy != PLAIN
            and not row.profile.baseline
        }
        if without:
            lines.append(
                f"Without a prediction: {', '.join(sorted(without))} (the record lacks "
                "what they read of the target, or time was up)."
            )
    if result.classifier is not None:
        lines.append(result.classifier["told_in_words"])
    return lines
