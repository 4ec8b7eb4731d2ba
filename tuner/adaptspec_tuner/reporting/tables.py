"""A tuning run on a terminal: sentences, a table as wide as fits, how to use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptspec.profile import LATENCY, PLAIN
from adaptspec_tuner.reporting import sentences as words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from adaptspec_tuner.reporting.result import Row, TuneResult


@dataclass(frozen=True)
class Column:
    """A figure of each row; one that no row has isn't shown.

    Args:
        title: At the column's head.
        cell: A row's figure as text; empty where it isn't known.
        meaning: For the legend.
        needed: Whether it is shown however narrow the terminal is.
    """

    title: str
    cell: Callable[[Row], str]
    meaning: str
    needed: bool = False


# In the order of what matters: where there is no room, those at the end are left out.
COLUMNS = (
    Column(
        "x plain",
        lambda row: f"{row.measurement.ratio:.2f}",
        "times as fast as plain decoding",
        needed=True,
    ),
    Column("95% interval", words.interval, "of that ratio", needed=True),
    Column(
        "tokens/s",
        lambda row: f"{row.measurement.tokens_per_second:.1f}",
        "decoding speed, median over prompts",
    ),
    Column(
        "same output",
        words.identical,
        "prompts with plain decoding's tokens (+ near ties); not compared if sampled",
    ),
    Column(
        "tokens/ forward",
        lambda row: (
            f"{row.measurement.tokens_per_forward:.2f}"
            if row.measurement.tokens_per_forward
            else ""
        ),
        "tokens gained by one pass of the model",
    ),
    Column("predicted", words.predicted, "by the replay, and how far off that was"),
    Column(
        "p95 ms/ token",
        lambda row: (
            ""
            if row.measurement.latency_p95 is None
            else f"{row.measurement.latency_p95:.1f}"
        ),
        "95% of the tokens took no longer",
    ),
    Column(
        "ms to first",
        lambda row: (
            ""
            if row.measurement.seconds_to_first is None
            else f"{1e3 * row.measurement.seconds_to_first:.0f}"
        ),
        "time to the first token, median over prompts",
    ),
    Column(
        "peak GiB",
        lambda row: (
            ""
            if row.measurement.peak_memory is None
            else f"{row.measurement.peak_memory / 2**30:.2f}"
        ),
        "memory, the model's weights included",
    ),
)
LEAST_NAME_WIDTH = 22
BETWEEN_COLUMNS = 2


def known_columns(result: TuneResult) -> list[Column]:
    """Those of which some row has a figure, the objective's own first."""
    rows = [row for found in result.classes for row in found.rows]
    known = [column for column in COLUMNS if any(map(column.cell, rows))]
    if result.objective == LATENCY:
        known.sort(key=lambda column: not (column.needed or "p95" in column.title))
    return known


def print_result(result: TuneResult, console: Console) -> None:
    """Print what was gained and chosen, the table, remarks, and how to use it."""
    from rich.padding import Padding
    from rich.text import Text

    def say(line: str = "", whole: bool = False) -> None:
        if whole or not line or not console.is_terminal:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        indent = len(line) - len(line.lstrip())
        text = Text(line.lstrip())
        console.print(Padding(text, (0, 0, 0, indent), expand=False), highlight=False)

    for line in words.opening(result):
        say(line)
    if result.named:
        say()
        say("Why:")
        for found in result.classes:
            say(f"  {words.shown_class(found.name)}: {found.choice.reason}")
        say()
        say(words.heading(result))
        table, shown = _table(result, console.width)
        console.print(table)
        about = words.ABOUT.get(result.objective)
        of = f"; the objective is {about}" if about else ""
        legend = (f"{' '.join(c.title.split())}: {c.meaning}" for c in shown)
        say("; ".join(legend) + of + ".")
        left_out = [c for c in known_columns(result) if c not in shown]
        if left_out:
            names = ", ".join(" ".join(c.title.split()) for c in left_out)
            say(f"Left out for want of width: {names}.")
        if changed := _changed(result):
            say()
            say("Parameters that differ from the defaults:")
            for line in changed:
                say(f"  {line}")
        say()
    for line in (*words.remarks(result), *words.summary(result)):
        say(line)
    if result.classes:
        say(f"Run {result.run}, stored in {result.db}", whole=True)
    for line in next_lines(result):
        say(line, whole=True)


def next_lines(result: TuneResult) -> list[str]:
    """What to type next; empty where it isn't known what was tuned."""
    if result.usage is None or not result.classes:
        return []
    if not result.usage.ours:
        line = result.usage.export()
        return ["", "How to start the engine with it:", f"  {line}"] if line else []
    return [
        "",
        "Use it from the command line:",
        f"  {result.usage.command()}",
        "or from Python:",
        *(f"  {line}" for line in result.usage.python()),
    ]


def print_by_concurrency(results: Sequence[TuneResult], console: Console) -> None:
    """Print what is chosen of each class at each number of requests at a time."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("class", overflow="fold")
    for result in results:
        count = result.environment.concurrency
        title = "1 request" if count == 1 else f"{count} requests"
        table.add_column(Text(title), overflow="fold")
    for name in dict.fromkeys(found.name for r in results for found in r.classes):
        cells = [
            next((words.at_a_load(c) for c in r.classes if c.name == name), "-")
            for r in results
        ]
        table.add_row(Text(words.shown_class(name)), *map(Text, cells))
    console.print()
    console.print(
        "What is chosen at each number of requests at a time, how many times as fast "
        "as plain decoding at that load, and tokens/s of one request:",
        highlight=False,
    )
    console.print(table)


def _table(result: TuneResult, width: int) -> tuple[Table, list[Column]]:
    """The table, at most ``width`` wide, and the columns that it has room for."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    known = known_columns(result)
    rows = [row for found in result.classes for row in found.rows]
    room = width - LEAST_NAME_WIDTH
    shown: list[Column] = []
    for column in known:
        room -= _width(column, rows) + BETWEEN_COLUMNS
        if not column.needed and room < 0:
            break
        shown.append(column)
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, BETWEEN_COLUMNS, 0, 0), show_edge=False
    )
    table.add_column("class, strategy", overflow="fold")
    for column in shown:
        table.add_column(
            Text(column.title), justify="right", width=_width(column, rows)
        )
    for found in result.classes:
        name = words.shown_class(found.name) + ("*" if found.reused else "")
        table.add_row(Text(name, style="bold"), *("" for _ in shown))
        found_rows = found.rows
        for number, row in enumerate(found_rows):
            described = ("> " if row.winner else "  ") + words.label(row)
            if row.strategy == PLAIN and not row.profile.baseline:
                described = ("> " if row.winner else "  ") + "plain decoding"
            table.add_row(
                Text(described),
                *(Text(column.cell(row)) for column in shown),
                style="bold" if row.winner else None,
                end_section=number == len(found_rows) - 1,
            )
    return table, shown


def _changed(result: TuneResult) -> list[str]:
    """Of each setting that isn't its strategy's default, how it differs."""
    return [
        f"{words.shown_class(found.name)}, {words.label(row)}: "
        + words.parameters(changed)
        for found in result.classes
        for row in found.rows
        if (changed := result.changed(row.strategy, row.profile.params))
    ]


def _width(column: Column, rows: Sequence[Row]) -> int:
    """Characters of its longest word in the head or longest cell."""
    return max(
        *(len(word) for word in column.title.split()),
        *(len(column.cell(row)) for row in rows),
    )
