"""Reports of a training run: JSON, a page with plots, a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptspec.charts import Series, chart, colour_rules, marks
from adaptspec_training.trainer import replace_file

if TYPE_CHECKING:
    from rich.console import Console

JSON, PAGE = "report.json", "report.html"
MOST_LINES = 8  # with a colour each
# Heads 1 to 5 of the reference's Vicuna 7B after about an epoch, on training text
# (medusa_acc.csv of its repository).
REFERENCE_TOP1 = (0.56, 0.32, 0.20, 0.15, 0.12)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """``report.json`` and ``report.html``, which needs nothing else."""
    replace_file(folder / JSON, json.dumps(report, indent=1, default=str).encode())
    replace_file(folder / PAGE, render(report).encode())


def render(report: Mapping[str, Any]) -> str:
    """The page: accuracy and loss over training, ranks, paths, what it took."""
    from jinja2 import Environment, PackageLoader

    pages = Environment(
        loader=PackageLoader("adaptspec_training", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("training.html").render(
        report=report,
        training=report["training"],
        rows=head_rows(report),
        guarded=report.get("target_loss"),
        marks=marks(),
        colour_rules=colour_rules(MOST_LINES),
        accuracy=_lines(report["log"], "top1", "right at first guess"),
        five=_lines(report["log"], "top5", "right among five"),
        loss=_losses(report["log"]),
    )


def head_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per head: its accuracy and, for comparison, the reference's."""
    return [
        {
            "head": index + 1,
            "top1": head["top1"],
            "top5": head["top5"],
            "reference": (
                REFERENCE_TOP1[index] if index < len(REFERENCE_TOP1) else None
            ),
        }
        for index, head in enumerate(report["heads"])
    ]


def print_report(report: Mapping[str, Any], folder: Path, console: Console) -> None:
    """The table, what it took, and the commands that use the heads."""
    from rich.table import Table

    table = Table("head", "top 1", "top 5", "reference top 1", title="Held-out text")
    for row in head_rows(report):
        reference = "-" if row["reference"] is None else f"{row['reference']:.2f}"
        table.add_row(
            str(row["head"]), f"{row['top1']:.3f}", f"{row['top5']:.3f}", reference
        )
    console.print(table)
    training = report["training"]
    spent = sum(training["seconds"].values())
    console.print(
        f"{training['examples']} answers, {training['tokens']} tokens; "
        f"{training['held_out_tokens']} held out, "
        f"{training['held_out_covered']:.1%} of them in the heads' vocabulary; "
        f"{spent / 60:.1f} minutes"
    )
    if guarded := report.get("target_loss"):
        console.print(
            f"the target's held-out loss: {guarded['before']:.4f} before, "
            f"{guarded['after']:.4f} after; use --model {folder / 'model'}"
        )
    console.print(f"next: adaptspec tune --heads {folder} ...; plots: {folder / PAGE}")


def _lines(log: Sequence[Mapping[str, Any]], key: str, title: str) -> str:
    steps = _steps(log)
    series = [
        Series(
            f"head {head + 1}",
            head % MOST_LINES,
            [(s, e["heads"][head][key]) for s, e in zip(steps, log, strict=True)],
        )
        for head in range(len(log[0]["heads"]))
    ]
    return chart(series, "step", title, title=title, percent=True, from_zero=True)


def _losses(log: Sequence[Mapping[str, Any]]) -> str:
    names = sorted({key for e in log for key in e if key.startswith("loss")})
    series = [
        Series(
            name.replace("_", " "),
            number % MOST_LINES,
            [(s, e[name]) for s, e in zip(_steps(log), log, strict=True) if name in e],
        )
        for number, name in enumerate(names)
    ]
    return chart(series, "step", "loss", title="Loss", from_zero=True)


def _steps(log: Sequence[Mapping[str, Any]]) -> list[int]:
    """Steps counted through all stages."""
    found, before, last, stage = [], 0, 0, log[0]["stage"]
    for entry in log:
        if entry["stage"] != stage:
            before, stage = before + last, entry["stage"]
        last = entry["step"]
        found.append(before + last)
    return found
