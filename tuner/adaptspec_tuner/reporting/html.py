"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adaptspec.charts import Series, chart, colour_rules, key, marks
from adaptspec.profile import PLAIN
from adaptspec_tuner.reporting import sentences as words
from adaptspec_tuner.reporting import tables

if TYPE_CHECKING:
    from adaptspec_tuner.reporting.result import ClassResult, Row, TuneResult

MOST_CONTEXTS = 8  # behind which forwards are timed, each with a colour
MOST_NOTES = 1500  # of all charts together: they are most of a page's size
Colours = Mapping[str, int | None]


def render(result: TuneResult) -> str:
    """The page: what was found in sentences, then bars, tables and charts."""
    from jinja2 import Environment, PackageLoader

    pages = Environment(
        loader=PackageLoader("adaptspec_tuner", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    colours = _colours(result)
    following = words.next_of(result.usage) if result.usage else {}
    measured = sum(not t.replayed for found in result.classes for t in found.tried)
    return pages.get_template("report.html").render(
        result=result,
        words=words,
        columns=tables.known_columns(result),
        keys={strategy: key(number) for strategy, number in colours.items()},
        colour_rules=colour_rules(max(MOST_CONTEXTS, len(colours))),
        command=following.get("command"),
        python="\n".join(following.get("python", ())),
        scale=_scale(result),
        bars=_bars,
        colours=colours,
        marks=marks(),
        costs=_costs(result),
        predicted=_predicted(result, colours),
        classes=[
            {
                "found": found,
                "acceptance": _acceptance(found, colours),
                "history": _history(
                    result, found, colours, noted=measured <= MOST_NOTES
                ),
                "failed": [trial for trial in found.tried if trial.state == "failed"],
            }
            for found in result.classes
        ],
    )


def _colours(result: TuneResult) -> dict[str, int | None]:
    """Strategy or baseline -> which of the page's colours; plain decoding has none."""
    names = {row.strategy for found in result.classes for row in found.rows}
    names |= {trial.strategy for found in result.classes for trial in found.tried}
    found: dict[str, int | None] = {PLAIN: None}
    found.update((name, i) for i, name in enumerate(sorted(names - {PLAIN})))
    return found


def _scale(result: TuneResult) -> float:
    """The ratio at the right end of the bars: of all classes the highest."""
    ends = [
        max(row.measurement.ratio, row.interval[1] if row.interval else 0.0)
        for found in result.classes
        for row in found.rows
    ]
    return 1.05 * max([1.0, *ends])


def _bars(found: ClassResult, scale: float) -> list[dict[str, object]]:
    """A bar for each setting but plain decoding: its parts in percent of the width."""
    bars: list[dict[str, object]] = []
    for row in found.rows:
        if row.strategy == PLAIN and not row.profile.baseline:
            continue
        low, high = row.interval or (row.measurement.ratio, row.measurement.ratio)
        bars.append(
            {
                "row": row,
                "width": _percent(row.measurement.ratio, scale),
                "low": _percent(low, scale),
                "span": _percent(high, scale) - _percent(low, scale),
            }
        )
    return bars


def _percent(value: float, scale: float) -> float:
    return round(100 * min(max(value / scale, 0.0), 1.0), 2)


def _costs(result: TuneResult) -> str:
    """Milliseconds of a forward by its tokens, a line per context."""
    series = []
    for who, table in result.costs.items():
        for number, context in enumerate(table["contexts"]):
            line = table["milliseconds"][number]
            series.append(
                Series(
                    f"{who}, {context} cached",
                    number % MOST_CONTEXTS,
                    list(zip(table["rows"], line, strict=True)),
                    dashed=who != "target",
                )
            )
    return chart(
        series,
        "tokens in one forward",
        "milliseconds",
        title="What a forward costs",
        from_zero=True,
    )


def _acceptance(found: ClassResult, colours: Colours) -> str:
    """Share of candidates accepted by depth; empty where nothing was recorded."""
    series = [
        Series(
            words.label(row), colours[row.strategy], list(enumerate(row.positions, 1))
        )
        for row in found.rows
        if row.positions and not row.profile.baseline
    ]
    return chart(
        series,
        "position in the draft",
        "accepted",
        title=f"Acceptance by position, {words.shown_class(found.name)}",
        percent=True,
        from_zero=True,
    )


def _history(
    result: TuneResult, found: ClassResult, colours: Colours, noted: bool
) -> str:
    """Trials in their order; empty without any.

    Args:
        noted: Whether each tells its parameters.
    """
    series = []
    for name, replayed in dict.fromkeys((t.strategy, t.replayed) for t in found.tried):
        trials = [
            (trial.number + 1, trial.ratio, trial)
            for trial in found.tried
            if (trial.strategy, trial.replayed) == (name, replayed)
            and trial.ratio is not None
        ]
        series.append(
            Series(
                name + (", replayed" if replayed else ""),
                colours[name],
                [(number, ratio) for number, ratio, _ in trials],
                [
                    words.parameters(result.changed(name, trial.params))
                    for *_, trial in trials
                ]
                if noted
                else [],
                joined=not replayed,
                pale=replayed,
                crossed=frozenset(
                    index
                    for index, (*_, trial) in enumerate(trials)
                    if trial.state != "complete"
                ),
            )
        )
    return chart(
        series,
        "trial",
        "x plain, tuning prompts",
        title=f"The search, {words.shown_class(found.name)}",
        level=1.0,
    )


def _predicted(result: TuneResult, colours: Colours) -> str:
    """Measured against predicted ratios; empty without predictions."""
    rows: dict[str, list[tuple[float, Row, str]]] = {}
    for found in result.classes:
        for row in found.rows:
            if row.predicted is not None:
                rows.setdefault(row.strategy, []).append(
                    (row.predicted, row, words.shown_class(found.name))
                )
    if not rows:
        return ""
    series = [
        Series(
            name,
            colours[name],
            [(guess, row.measurement.ratio) for guess, row, _ in found],
            [where for *_, where in found],
            joined=False,
        )
        for name, found in rows.items()
    ]
    ends = [value for one in series for point in one.points for value in point]
    equal = [(end, end) for end in (min(ends), max(ends))]
    return chart(
        [*series, Series("equal", None, equal, dashed=True, marked=False)],
        "predicted x plain",
        "measured x plain",
        title="Predicted and measured",
    )


__all__: Sequence[str] = ("render",)
