"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from adaptspec.profile import PLAIN
from adaptspec_tuner.reporting import tables as words

if TYPE_CHECKING:
    from adaptspec_tuner.reporting.result import ClassResult, Row, TuneResult

INK, GRID = "#7d8590", "rgba(125,133,144,0.25)"
COLOURS = (
    *("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb"),
    *("#e69f00", "#009e73", "#cc79a7"),
)


def render(result: TuneResult) -> str:
    """The page: tables and plots, Plotly's code included."""
    from jinja2 import Environment, PackageLoader
    from plotly.offline import get_plotlyjs

    pages = Environment(
        loader=PackageLoader("adaptspec_tuner", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    strategies = sorted({row.strategy for c in result.classes for row in c.rows})
    colours = {
        name: COLOURS[index % len(COLOURS)]
        for index, name in enumerate(s for s in strategies if s != PLAIN)
    }
    colours[PLAIN] = INK
    return pages.get_template("report.html").render(
        result=result,
        words=words,
        plotly=get_plotlyjs(),
        speed=_html(_speed(result, colours)),
        latency=_html(_latency(result)) if result.costs else "",
        classes=[
            {
                "found": found,
                "acceptance": _html(_acceptance(found, colours)),
                "history": _html(_history(found, colours)),
                "failed": [trial for trial in found.tried if trial.state == "failed"],
            }
            for found in result.classes
        ],
        predicted=_html(_predicted(result, colours)),
    )


def _speed(result: TuneResult, colours: dict[str, str]) -> Any:
    """Bars by class and strategy, with intervals."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name in colours:
        bars = [
            (found, row)
            for found in result.classes
            for row in found.rows
            if row.strategy == name and (name != PLAIN or len(found.rows) == 1)
        ]
        if not bars:
            continue
        ratios = [row.measurement.ratio for _, row in bars]
        spans = [
            row.interval or (ratio, ratio)
            for (_, row), ratio in zip(bars, ratios, strict=True)
        ]
        figure.add_bar(
            name=_labelled([row for _, row in bars]),
            x=[_safe(found.name) for found, _ in bars],
            y=ratios,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [
                    max(0.0, high - ratio)
                    for ratio, (_, high) in zip(ratios, spans, strict=True)
                ],
                "arrayminus": [
                    max(0.0, ratio - low)
                    for ratio, (low, _) in zip(ratios, spans, strict=True)
                ],
            },
            marker_color=colours[name],
            hovertext=[_about(row) for _, row in bars],
        )
    figure.add_hline(y=1, line={"color": INK, "dash": "dot"})
    figure.update_xaxes(type="category")  # a class may be called 2024
    return _styled(figure, "", words.COLUMN[result.objective].split(" [")[0])


def _latency(result: TuneResult) -> Any:
    """Milliseconds of a forward by its tokens, a line per context."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for who, table in result.costs.items():
        for number, context in enumerate(table["contexts"]):
            figure.add_scatter(
                name=f"{who}, {context} cached",
                x=table["rows"],
                y=table["milliseconds"][number],
                mode="lines+markers",
                line={"dash": "solid" if who == "target" else "dot"},
                marker_color=COLOURS[number % len(COLOURS)],
            )
    return _styled(figure, "tokens in one forward", "ms")


def _acceptance(found: ClassResult, colours: dict[str, str]) -> Any:
    """Share of candidates accepted by depth; None where nothing was recorded."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for row in found.rows:
        if row.positions and not row.profile.baseline:
            figure.add_scatter(
                name=_labelled([row]),
                x=list(range(1, len(row.positions) + 1)),
                y=list(row.positions),
                mode="lines+markers",
                marker_color=colours[row.strategy],
            )
    if not figure.data:
        return None
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%")
    return _styled(figure, "position drafted", "accepted")


def _history(found: ClassResult, colours: dict[str, str]) -> Any:
    """Trials in their order; None without any."""
    import plotly.graph_objects as go

    figure = go.Figure()
    kinds = dict.fromkeys((t.strategy, t.replayed) for t in found.tried)
    for name, replayed in kinds:
        trials = [
            t
            for t in found.tried
            if (t.strategy, t.replayed) == (name, replayed) and t.ratio is not None
        ]
        if trials:
            figure.add_scatter(
                name=_safe(name) + (", replayed" if replayed else ""),
                x=[trial.number + 1 for trial in trials],
                y=[trial.ratio for trial in trials],
                mode="markers" if replayed else "lines+markers",
                opacity=0.4 if replayed else 1.0,
                marker={
                    "color": colours.get(name, INK),
                    "size": 4 if replayed else 7,
                    "symbol": [
                        "circle" if t.state == "complete" else "x-thin-open"
                        for t in trials
                    ],
                },
                line={"width": 1},
                hovertext=[_safe(words.parameters(t.params)) for t in trials],
            )
    if not figure.data:
        return None
    figure.add_hline(y=1, line={"color": INK, "dash": "dot"})
    return _styled(figure, "trial", "x plain, tuning prompts")


def _predicted(result: TuneResult, colours: dict[str, str]) -> Any:
    """Measured against predicted ratios; None without predictions."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name in colours:
        rows = [
            (found, row)
            for found in result.classes
            for row in found.rows
            if row.strategy == name and row.predicted is not None
        ]
        if rows:
            figure.add_scatter(
                name=_labelled([row for _, row in rows]),
                x=[row.predicted for _, row in rows],
                y=[row.measurement.ratio for _, row in rows],
                mode="markers",
                marker={"color": colours[name], "size": 9},
                hovertext=[_safe(found.name) for found, _ in rows],
            )
    if not figure.data:
        return None
    ends = [
        value for trace in figure.data for value in (*(trace.x or ()), *(trace.y or ()))
    ]
    span = [min(ends), max(ends)]
    figure.add_scatter(
        name="equal", x=span, y=span, mode="lines", line={"color": INK, "dash": "dot"}
    )
    return _styled(figure, "predicted x plain", "measured x plain")


def _styled(figure: Any, across: str, up: str) -> Any:
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": INK, "family": "system-ui, sans-serif", "size": 12},
        margin={"l": 60, "r": 10, "t": 10, "b": 45},
        height=320,
        legend={"orientation": "h", "y": 1.12},
        showlegend=True,
        barmode="group",
    )
    figure.update_xaxes(title=across, gridcolor=GRID, zeroline=False)
    figure.update_yaxes(title=up, gridcolor=GRID, zeroline=False)
    return figure


def _html(figure: Any) -> str:
    """A figure's element and script; empty for none."""
    if figure is None:
        return ""
    from plotly.io import to_html

    return str(
        to_html(
            figure,
            include_plotlyjs=False,
            full_html=False,
            config={"displayModeBar": False, "responsive": True},
        )
    )


def _labelled(rows: Sequence[Row]) -> str:
    """The strategy's name, with NOT LOSSLESS or baseline if any of its rows is."""
    return _safe(max((words.label(row) for row in rows), key=len))


def _about(row: Row) -> str:
    parameters = _safe(words.parameters(row.profile.params))
    return f"{_safe(words.label(row))}: {words.ratio(row)}<br>{parameters}"


def _safe(text: str) -> str:
    """Plotly reads some HTML in its texts; names are the user's."""
    return escape(text, quote=False)


__all__: Sequence[str] = ("render",)
