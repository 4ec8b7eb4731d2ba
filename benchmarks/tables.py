"""From runs to the table: medians, quartiles, ratios paired by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, mean, median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from contenders import HF, PLAIN, RIVALS, THEIRS

ALL = "all"


@dataclass(frozen=True)
class TimedAnswer:
    """One prompt decoded once by one contender."""

    contender: str
    prompt: str
    prompt_class: str
    tokens: list[int]
    ms_per_token: float | None  # None for an output of one token
    tokens_per_forward: float | None
    repeat: int = 0


def spread(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return [values[0]] * 3 if values else [float("nan")] * 3
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


def per_prompt(runs: Sequence[TimedAnswer]) -> dict[tuple[str, str], float]:
    """(contender, prompt) -> median ms a token over the repeats."""
    times: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.ms_per_token is not None:
            times.setdefault((run.contender, run.prompt), []).append(run.ms_per_token)
    return {key: median(found) for key, found in times.items()}


def summarise(
    runs: Sequence[TimedAnswer],
    ties: Mapping[tuple[str, str], bool],
    strategies: Mapping[str, str],
) -> list[dict[str, Any]]:
    """A row per class and contender, the class ``all`` last.

    Means are geometric, over the prompts that all contenders were timed on. Ratios are
    paired by prompt: to ``generate``, to our plain decoding, and to the best
    setting of Hugging Face's own strategy of the same kind (of all theirs, where there
    is none), best in that class. ``strategies`` says what each contender is.
    """
    ms = per_prompt(runs)
    names = list(dict.fromkeys(run.contender for run in runs))
    classes = [*dict.fromkeys(run.prompt_class for run in runs), ALL]
    of_class = {run.prompt: run.prompt_class for run in runs}
    tokens: dict[tuple[str, str], list[list[int]]] = {}
    for run in runs:
        tokens.setdefault((run.contender, run.prompt), []).append(run.tokens)
    rows = []
    for prompt_class in classes:
        prompts = [p for p, c in of_class.items() if prompt_class in (c, ALL)]
        # A mean over other prompts than plain decoding's or another's says nothing.
        shared = [p for p in prompts if all((name, p) in ms for name in names)]
        for name in names:
            timed = [p for p in prompts if (name, p) in ms]
            if not timed:
                continue

            def ratios(
                other: str | None, name: str = name, timed: Sequence[str] = timed
            ) -> list[float] | None:
                if other is None:
                    return None
                pairs = [(ms[other, p], ms[name, p]) for p in timed if (other, p) in ms]
                return spread([a / b for a, b in pairs]) if pairs else None

            wanted = rivals_of(strategies[name])
            rivals = [other for other in names if strategies[other] in wanted]
            rival = best_of(rivals, prompts, ms)
            per_forward = [
                r.tokens_per_forward
                for r in runs
                if r.contender == name and r.prompt in timed and r.tokens_per_forward
            ]
            rows.append(
                {
                    "class": prompt_class,
                    "contender": name,
                    "prompts": len(timed),
                    "ms_per_token": spread([ms[name, p] for p in timed]),
                    "times_hf": ratios(HF),
                    "times_plain": ratios(PLAIN),
                    "mean_times_plain": geometric_mean(
                        [ms[PLAIN, p] / ms[name, p] for p in shared]
                    )
                    if shared
                    else None,
                    "mean_ms": geometric_mean([ms[name, p] for p in shared])
                    if shared
                    else None,
                    "rival": rival,
                    "times_rival": ratios(rival),
                    "tokens_per_forward": median(per_forward) if per_forward else None,
                    "mean_per_forward": mean(per_forward) if per_forward else None,
                    "identical": sum(
                        all(t == tokens[PLAIN, p][0] for t in tokens[name, p])
                        for p in timed
                    ),
                    "near_ties": sum(ties.get((name, p), False) for p in timed),
                }
            )
    return rows


def rivals_of(strategy: str) -> Sequence[str]:
    """Theirs that a strategy of ours is held against; none for theirs."""
    if strategy in (*THEIRS, PLAIN, "vllm", "flashspec"):
        return ()
    return (RIVALS[strategy],) if strategy in RIVALS else THEIRS


def best_of(
    names: Sequence[str], prompts: Sequence[str], ms: Mapping[tuple[str, str], float]
) -> str | None:
    """The contender with the least median time on these prompts."""
    timed = {
        name: median(found)
        for name in names
        if (found := [ms[name, p] for p in prompts if (name, p) in ms])
    }
    return min(timed, key=lambda name: timed[name], default=None)


def show_table(console: Console, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print them, a section per class."""
    table = Table(title=title, title_justify="left")
    for column in ("class", "contender", "ms/token", "x generate", "x our plain"):
        table.add_column(column)
    for column in ("x best of theirs", "tokens/forward", "identical to our plain"):
        table.add_column(column)
    for row, last in with_last(rows):
        per = row["tokens_per_forward"]
        ties = f" (+{row['near_ties']} near-ties)" if row["near_ties"] else ""
        rival = f" {row['rival']}" if row["rival"] else ""
        table.add_row(
            row["class"],
            row["contender"],
            _spread(row["ms_per_token"], 1),
            _spread(row["times_hf"], 2),
            _spread(row["times_plain"], 2),
            _spread(row["times_rival"], 2) + rival,
            f"{per:.2f}" if per else "-",
            f"{row['identical']}/{row['prompts']}{ties}",
            end_section=last,
        )
    console.print(table, markup=False)


def show_speeds(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print speeds over plain decoding, a row per class, a column per contender."""
    table = Table(
        title="Speed over our plain decoding, geometric mean over prompts",
        title_justify="left",
    )
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for column in ("class, prompts", *names):
        table.add_column(column)
    found = {(row["class"], row["contender"]): row for row in rows}

    def cells(group: str, key: str, digits: int) -> list[str]:
        values = [found.get((group, name), {}).get(key) for name in names]
        return ["-" if v is None else f"{v:.{digits}f}" for v in values]

    for group in dict.fromkeys(row["class"] for row in rows):
        count = min(row["prompts"] for row in rows if row["class"] == group)
        table.add_row(f"{group}, {count}", *cells(group, "mean_times_plain", 2))
    table.add_section()
    table.add_row("ms a token", *cells(ALL, "mean_ms", 0))
    table.add_row("tokens a forward", *cells(ALL, "mean_per_forward", 2))
    console.print(table, markup=False)


def with_last(
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Each row, and whether it is its class's last."""
    for at, row in enumerate(rows):
        after = rows[at + 1]["class"] if at + 1 < len(rows) else None
        yield row, after != row["class"]


def _spread(values: Sequence[float] | None, digits: int) -> str:
    if values is None:
        return "-"
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}-{high}]"
