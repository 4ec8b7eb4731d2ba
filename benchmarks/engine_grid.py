"""What a tune of another engine chose, against plain decoding, defaults and a grid.

    python benchmarks/engine_grid.py WORKLOAD --db profiles.db --engine llama.cpp \\
        --model model.gguf --draft-model draft.gguf --context 1400 --json out.json

On prompts that the tune held out, each class's choice, every method's defaults and a
grid of the parameters' smallest, middle and largest values answer in turns with plain
decoding. The grid's best of a class is picked on the same answers on which it is shown,
so it is flattered; the choice isn't. Cells are times as fast as plain decoding, by the
time of the whole answer for a token.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from adaptspec.engines.inference_engine import (
    PLAIN_METHOD,
    EngineOptions,
    InferenceEngine,
    Method,
)
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.params import ParamSpec, Scalar
from adaptspec.selector import select
from adaptspec.workloads import Prompt, read_workload, split

Setting = tuple[str, str]  # a method and its parameters as JSON


def values(spec: ParamSpec) -> list[Scalar]:
    """The smallest, middle and largest searched value; all of a choice."""
    if spec.tunable is None:
        return [spec.default]
    if spec.choices:
        return list(spec.choices)
    low, high = float(spec.tunable.low or 0), float(spec.tunable.high or 0)
    middle = math.sqrt(low * high) if spec.tunable.log else (low + high) / 2
    found = [low, middle, high]
    return sorted({int(v) for v in found} if spec.kind == "int" else set(found))


def grid(method: Method, most: int) -> Iterator[Mapping[str, Scalar]]:
    """The defaults, then as many combinations as ``most`` allows, evenly spread."""
    specs = method.Params.specs()
    yield {spec.name: spec.default for spec in specs}
    every = list(itertools.product(*map(values, specs))) if specs else []
    step = max(1, -(-len(every) // max(1, most)))
    for chosen in every[step // 2 :: step]:
        yield dict(zip((spec.name for spec in specs), chosen, strict=True))


def measured(
    engine: InferenceEngine,
    settings: Sequence[Setting],
    prompts: Sequence[Prompt],
    tokens: int,
) -> dict[Setting, dict[str, float]]:
    """Setting -> prompt id -> how many times as fast as plain decoding beside it."""
    plain = (PLAIN_METHOD.name, "{}")
    ratios: dict[Setting, dict[str, float]] = {}

    def seconds(setting: Setting, prompt: Prompt) -> float:
        name, params = setting
        (answer,) = engine.answer(name, json.loads(params), [prompt], tokens)
        return answer.seconds / max(1, answer.tokens)

    size = max(1, engine.room - 1)
    for start in range(0, len(settings), size):
        group = settings[start : start + size]
        for name, params in [plain, *group]:  # what a first answer takes doesn't count
            with suppress(AdaptSpecError):
                engine.answer(name, json.loads(params), [prompts[0]], 4)
        for turn, prompt in enumerate(prompts):
            at = turn % len(group)
            took: dict[Setting, float] = {}
            for setting in [plain, *group[at:], *group[:at]]:
                try:
                    took[setting] = seconds(setting, prompt)
                except AdaptSpecError as error:
                    click.echo(f"{setting}: {error}", err=True)
            for setting in group:
                if setting in took and plain in took:
                    ratio = took[plain] / took[setting]
                    ratios.setdefault(setting, {})[prompt.id] = ratio
        click.echo(f"{start + len(group)} of {len(settings)} settings", err=True)
    return ratios


def mean(ratios: Mapping[str, float], prompts: Sequence[Prompt]) -> float:
    """Geometric mean over those of ``prompts`` that were measured."""
    logs = [math.log(ratios[p.id]) for p in prompts if p.id in ratios]
    return math.exp(fmean(logs)) if logs else math.nan


@click.command()
@click.argument("workload", type=Path)
@click.option("--db", required=True)
@click.option("--engine", "name", required=True)
@click.option("--engine-command")
@click.option("--engine-python")
@click.option("--model", required=True)
@click.option("--draft-model")
@click.option("--context", type=int)
@click.option("-n", "tokens", default=48, show_default=True, help="New tokens.")
@click.option("--per-class", default=2, show_default=True, help="Held-out prompts.")
@click.option("--grid", "most", default=2, show_default=True, help="For each method.")
@click.option("-s", "--method", "names", multiple=True, help="Default: all.")
@click.option("--json", "path", type=Path, help="Write what was measured.")
def main(
    workload: Path,
    db: str,
    name: str,
    engine_command: str | None,
    engine_python: str | None,
    model: str,
    draft_model: str | None,
    context: int | None,
    tokens: int,
    per_class: int,
    most: int,
    names: Sequence[str],
    path: Path | None,
) -> None:
    """Print a row for each class."""
    host = Host.installed()
    options = EngineOptions(
        name,
        model,
        draft_model,
        command=engine_command,
        python=engine_python,
        context=context,
    )
    _, held_out = split(read_workload(workload))
    groups = {name: g[:per_class] for name, g in held_out.by_class().items()}
    prompts = [p for turn in zip(*groups.values(), strict=False) for p in turn]
    with host.engines[name].open(options) as engine:
        with closing(host.open_store(db)) as store:
            stored = store.choices(model=engine.environment.model)
        chosen = {kind: select(stored, engine.environment, kind) for kind in groups}
        defaults: dict[str, Setting] = {}
        settings: list[Setting] = []
        for method in engine.methods[1:]:
            if names and method.name not in names:
                continue
            found = [
                (method.name, json.dumps(dict(params), sort_keys=True))
                for params in grid(method, most)
            ]
            defaults[method.name] = found[0]
            settings += found
        choices: dict[str, Setting] = {
            kind: (c.strategy, json.dumps(dict(c.params), sort_keys=True))
            for kind, c in chosen.items()
        }
        plain = PLAIN_METHOD.name
        settings += [s for s in choices.values() if s[0] != plain]
        settings = list(dict.fromkeys(settings))
        ratios = measured(engine, settings, prompts, tokens)
    table = Table(title=f"{name}: times as fast as plain decoding")
    for column in ("class", "choice", "", "grid's best", "", "choice / best"):
        table.add_column(column)
    shares = []
    rows: list[dict[str, Any]] = []
    for kind, group in groups.items():
        own = choices[kind]
        ratio = 1.0 if own[0] == plain else mean(ratios.get(own, {}), group)
        each = {s: mean(found, group) for s, found in ratios.items()}
        best = max(each, key=lambda s: each[s])
        top = max(1.0, each[best])
        shares.append(ratio / top)
        table.add_row(
            *(kind, own[0], f"{ratio:.2f}", best[0], f"{top:.2f}"),
            f"{ratio / top:.2f}",
        )
        by_default = {m: round(each[s], 3) for m, s in defaults.items() if s in each}
        rows.append(
            {"class": kind, "choice": own, "ratio": ratio, "best": best, "top": top}
            | {"defaults": by_default}
        )
    every = [p for group in groups.values() for p in group]
    for named, setting in defaults.items():
        if setting in ratios:
            all_of_it = mean(ratios[setting], every)
            lowest = min(mean(ratios[setting], g) for g in groups.values())
            table.add_row(
                *("defaults", named, f"{all_of_it:.2f}", "its worst class"),
                *(f"{lowest:.2f}", ""),
            )
    Console(width=110).print(table)
    share = math.exp(fmean(map(math.log, shares)))
    click.echo(f"choice over the grid's best, geometric mean: {share:.3f}")
    if path is not None:
        path.write_text(json.dumps({"rows": rows, "share": share}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except AdaptSpecError as error:
        raise SystemExit(f"Error: {error}") from None
