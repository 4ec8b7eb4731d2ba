"""What a tune of another engine chose, against plain decoding, defaults and a grid.

    python benchmarks/engine_grid.py WORKLOAD --db profiles.db --engine llama.cpp \\
        --model model.gguf --draft-model draft.gguf --context 1400 --json out.json

On prompts that the tune held out, each class's choice, every method's defaults and a
grid of the parameters' smallest, middle and largest values answer in turns with plain
decoding. The grid's best of a class is shown twice: picked on the same answers on which
it is shown, which flatters it, and for each prompt picked on the class's others, as one
would have to who doesn't know the prompt. Cells are times as fast as plain decoding, by
the time of the whole answer for a token.

Everything measured is in the file of ``--json`` at once: stopped, or ended by
``--seconds``, the same command continues.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from statistics import fmean, stdev
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
from adaptspec_tuner.engines.as_tuned import as_tuned

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


class Measured:
    """Setting -> prompt id -> how many times as fast as plain decoding beside it.

    Args:
        path: Where it is kept, and read from; None: nowhere.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.ratios: dict[Setting, dict[str, float]] = {}
        self.failed: dict[Setting, str] = {}
        if path is not None and path.exists():
            state = json.loads(path.read_text())
            for name, params, ratios in state["measured"]:
                self.ratios[name, params] = ratios

    def missing(self, setting: Setting, prompts: Sequence[Prompt]) -> bool:
        """Whether it wasn't measured on one of them."""
        if setting in self.failed:
            return False
        return any(p.id not in self.ratios.get(setting, {}) for p in prompts)

    def save(self, **more: Any) -> None:
        """Keep it, with what else there is to tell."""
        if self._path is not None:
            told = [[*setting, ratios] for setting, ratios in self.ratios.items()]
            text = json.dumps({**more, "measured": told}, indent=1)
            self._path.write_text(text)


def measure(
    engine: InferenceEngine,
    settings: Sequence[Setting],
    prompts: Sequence[Prompt],
    tokens: int,
    measured: Measured,
    in_time: Callable[[], bool] = lambda: True,
) -> None:
    """Answer ``prompts`` with ``settings``, as many at a time as the engine holds, each
    in turns with plain decoding; what is measured already isn't measured again."""
    plain = (PLAIN_METHOD.name, "{}")

    def seconds(setting: Setting, prompt: Prompt) -> float:
        name, params = setting
        (answer,) = engine.answer(name, json.loads(params), [prompt], tokens)
        return answer.seconds / max(1, answer.tokens)

    size = max(1, engine.room - 1)
    left = [s for s in settings if measured.missing(s, prompts)]
    for start in range(0, len(left), size):
        if not in_time():
            click.echo(f"no time for {len(left) - start} settings", err=True)
            return
        group = left[start : start + size]
        for name, params in [plain, *group]:  # what a first answer takes doesn't count
            with suppress(AdaptSpecError):
                engine.answer(name, json.loads(params), [prompts[0]], 4)
        for turn, prompt in enumerate(prompts):
            at = turn % len(group)
            took: dict[Setting, float] = {}
            for setting in [plain, *group[at:], *group[:at]]:
                if setting in measured.failed:
                    continue
                try:
                    took[setting] = seconds(setting, prompt)
                except AdaptSpecError as error:
                    measured.failed[setting] = str(error)
                    click.echo(f"{setting}: {error}", err=True)
            for setting in group:
                if setting in took and plain in took:
                    ratio = took[plain] / took[setting]
                    measured.ratios.setdefault(setting, {})[prompt.id] = ratio
        measured.save()
        click.echo(f"{start + len(group)} of {len(left)} settings", err=True)


def best(
    ratios: Mapping[Setting, Mapping[str, float]], prompts: Sequence[Prompt]
) -> tuple[Setting, float]:
    """The setting with the highest mean, plain decoding among them."""
    each = {setting: mean(found, prompts) for setting, found in ratios.items()}
    each[PLAIN_METHOD.name, "{}"] = 1.0
    known = {setting: ratio for setting, ratio in each.items() if ratio == ratio}
    found = max(known, key=lambda setting: known[setting])
    return found, known[found]


def best_of_others(
    ratios: Mapping[Setting, Mapping[str, float]], prompts: Sequence[Prompt]
) -> float:
    """What the grid's best reaches on prompts that it wasn't picked on.

    For each prompt it is picked on the others; the geometric mean of what it reaches.
    NaN for one prompt.
    """
    logs = []
    for prompt in prompts:
        others = [p for p in prompts if p is not prompt]
        if others:
            picked, _ = best(ratios, others)
            logs.append(math.log(ratios.get(picked, {}).get(prompt.id, 1.0)))
    return math.exp(fmean(logs)) if logs else math.nan


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
@click.option("--seconds", type=float, help="Begin no more settings after these.")
@click.option("--json", "path", type=Path, help="Keep what is measured.")
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
    seconds: float | None,
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
    with closing(host.open_store(db)) as store:
        options = as_tuned(options, store)  # with the threads and context of the tune
        with host.engines[name].open(options) as engine:
            stored = store.choices(model=engine.environment.model)
            chosen = {kind: select(stored, engine.environment, kind) for kind in groups}
            defaults: dict[str, Setting] = {}  # method -> its documented defaults
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
            usual = set(defaults.values())
            settings += [s for s in choices.values() if s[0] != plain]
            settings = list(dict.fromkeys(settings))
            measured = Measured(path)
            ended = time.monotonic() + (math.inf if seconds is None else seconds)
            # What was chosen first: it is what all others are compared with.
            settings.sort(key=lambda s: (s not in choices.values(), s not in usual))
            measure(
                *(engine, settings, prompts, tokens, measured),
                in_time=lambda: time.monotonic() < ended,
            )
    ratios = {s: measured.ratios[s] for s in settings if s in measured.ratios}
    table = Table(title=f"{name}: times as fast as plain decoding")
    for column in ("class", "choice", "", "grid's best", "", "of other prompts"):
        table.add_column(column)
    flattered, fair = [], []
    rows: list[dict[str, Any]] = []
    for kind, group in groups.items():
        own = choices[kind]
        reached = 1.0 if own[0] == plain else mean(ratios.get(own, {}), group)
        top, highest = best(ratios, group)
        honest = best_of_others(ratios, group)
        flattered.append(reached / highest)
        fair.append(reached / honest)
        table.add_row(
            *(kind, own[0], f"{reached:.2f}", top[0], f"{highest:.2f}"),
            f"{honest:.2f}",
        )
        by_default = {
            m: round(mean(ratios[s], group), 3)
            for m, s in defaults.items()
            if s in ratios
        }
        rows.append(
            {"class": kind, "choice": own, "ratio": reached, "best": top}
            | {"top": highest, "of_others": honest, "defaults": by_default}
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
    shares = {
        "the grid's best, picked on these prompts": flattered,
        "the grid's best, picked on the class's other prompts": fair,
    }
    for what, each in shares.items():
        logs = [math.log(share) for share in each if share == share]
        if logs:
            error = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
            click.echo(
                f"choice over {what}: {math.exp(fmean(logs)):.3f} ± {error:.3f} "
                f"({len(logs)} classes)"
            )
    measured.save(rows=rows)


if __name__ == "__main__":
    try:
        main()
    except AdaptSpecError as error:
        raise SystemExit(f"Error: {error}") from None
