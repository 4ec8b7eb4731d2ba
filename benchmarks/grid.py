"""Tuning against an exhaustive grid: how near to its best, in a tenth of its time.

    python benchmarks/grid.py --model M --draft-model D [--workload W] [--json OUT]

The grid measures every setting of prompt lookup and the draft model on the tuning half
of each class, as `tune` splits it. Then `tune` runs with several seeds, each in a tenth
of the grid's time, from an empty store. At last the grid's best settings of each class,
what each seed found and plain decoding are measured interleaved on the held-out half.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click

from adaptspec.decoding.engine import Engine
from adaptspec.host import Host
from adaptspec.models import load_model
from adaptspec.params import Scalar
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.bootstrap import overall
from adaptspec_tuner.confirm import Confirmed, confirm
from adaptspec_tuner.profiler import PLAIN_SETTING, Profiler, Sample, Setting
from adaptspec_tuner.tuning import tune
from adaptspec_tuner.workloads import (
    Prompt,
    Workload,
    example_workload,
    read_workload,
    split,
)

AXES: Mapping[str, Mapping[str, Sequence[Scalar]]] = {
    "prompt_lookup": {"num_tokens": (2, 3, 5, 8, 12, 16, 24), "max_ngram": (3, 4, 6)},
    "draft_model": {"k": (1, 2, 3, 4, 6, 8), "stop": (0.0, 0.4)},
}
SHARE = 0.1  # of the grid's time, for one tuning
BEST = 2  # of the grid, compared on held-out prompts


def grid(host: Host) -> list[Setting]:
    """Every combination, the other parameters at their defaults."""
    found = []
    for name, axes in AXES.items():
        params = host.strategy(name).Params
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            found.append(Setting(name, params.parse(chosen, name).model_dump()))
    return found


def measure_grid(
    profiler: Profiler, settings: Sequence[Setting], prompts: Sequence[Prompt]
) -> list[tuple[float, Setting]]:
    """Ratio to plain decoding of each setting, best first; plain is measured anew for
    every few settings, so that the machine's moods favour none."""
    ranked = []
    plain: dict[str, Sample] = {}
    for number, setting in enumerate(settings):
        if number % 8 == 0:
            plain = {p.id: profiler.measure(PLAIN_SETTING, p) for p in prompts}
        profiler.forget()
        gains = [[profiler.measure(setting, p).gain(plain[p.id])] for p in prompts]
        ranked.append((overall(gains), setting))
    return sorted(ranked, key=lambda pair: -pair[0])


def shown(setting: Setting) -> str:
    """Its varied parameters."""
    names = AXES.get(setting.strategy, setting.params)
    return f"{setting.strategy} " + " ".join(f"{n}={setting.params[n]}" for n in names)


@click.command()
@click.option("--model", required=True)
@click.option("--draft-model", required=True)
@click.option("--workload", type=Path, help="Default: the examples.")
@click.option("--classes", default="chat,code_edit,summarization", show_default=True)
@click.option("--limit", default=6, show_default=True, help="Prompts per class.")
@click.option("-n", "--max-new-tokens", default=32, show_default=True)
@click.option("--seeds", default=5, show_default=True)
@click.option("--repeats", default=2, show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--json", "out", type=Path)
def main(
    model: str,
    draft_model: str,
    workload: Path | None,
    classes: str,
    limit: int,
    max_new_tokens: int,
    seeds: int,
    repeats: int,
    dtype: str,
    out: Path | None,
) -> None:
    """Compare `tune` with an exhaustive grid."""
    host = Host.installed()
    target, draft = (load_model(m, dtype=dtype) for m in (model, draft_model))
    read = example_workload() if workload is None else read_workload(workload)
    wanted = [name.strip() for name in classes.split(",")]
    prompts: list[Prompt] = []
    for name in wanted:
        prompts += read.by_class()[name][:limit]
    shortened = [replace(p, max_new_tokens=max_new_tokens) for p in prompts]
    chosen = Workload(read.name, tuple(shortened))
    profiler = Profiler(Engine(target, draft), host, max_new_tokens)
    tuning, held_out = split(chosen, 0)
    settings = grid(host)
    report: dict[str, Any] = {"settings": len(settings), "classes": {}}

    started = perf_counter()
    best = {}
    for name in wanted:
        best[name] = measure_grid(profiler, settings, tuning.by_class()[name])
        for gain, setting in best[name][:3]:
            click.echo(f"grid {name}: {gain:.2f} {shown(setting)}")
    taken = perf_counter() - started
    click.echo(
        f"grid: {len(settings)} settings x {len(wanted)} classes in {taken:.0f} s"
    )

    found: dict[str, list[Setting]] = {name: [] for name in wanted}
    times = []
    for seed in range(seeds):
        began = perf_counter()
        result = tune(
            target,
            draft,
            chosen,
            db=MemoryStore(),
            budget=taken * SHARE,
            strategies=list(AXES),
            seed=seed,
            max_new_tokens=max_new_tokens,
            host=host,
        )
        times.append(perf_counter() - began)
        for told in result.classes:
            choice = told.choice
            found[told.name].append(Setting(choice.strategy, dict(choice.params)))
            click.echo(f"seed {seed} {told.name}: {choice.strategy}: {choice.reason}")
        for note in result.notes:
            click.echo(f"seed {seed}: {note}")
        click.echo(f"seed {seed}: {times[-1]:.0f} s of {taken * SHARE:.0f} s")

    for name in wanted:
        compared = [setting for _, setting in best[name][:BEST]]
        compared += [s for s in found[name] if s.strategy != PLAIN_SETTING.strategy]
        unique = list({s.key: s for s in compared}.values())
        confirmed = confirm(
            profiler,
            unique,
            held_out.by_class()[name],
            repeats=repeats,
            in_time=lambda seconds, count: True,
            warn=click.echo,
        )

        def ratio(
            setting: Setting, measured: Mapping[str, Confirmed] = confirmed
        ) -> float:
            return measured[setting.key].measurement.ratio

        top = max(ratio(setting) for _, setting in best[name][:BEST])
        # Plain decoding is a choice, too: its ratio is 1.
        ours = [
            1.0 if s.strategy == PLAIN_SETTING.strategy else ratio(s)
            for s in found[name]
        ]
        names = [s.strategy for s in found[name]]
        most = max((names.count(n) for n in names), default=0)
        report["classes"][name] = {
            "grid_best": top,
            "tuned": ours,
            "tuned_to_best": [value / max(top, 1.0) for value in ours],
            "winners": names,
        }
        click.echo(
            f"{name}: grid's best {top:.2f}; tuned "
            f"{', '.join(f'{v:.2f}' for v in ours)}; median of tuned to best "
            f"{median(ours) / max(top, 1.0) if ours else 0:.3f}; same winner in {most} "
            f"of {seeds}"
        )
        for setting in unique:
            measured = confirmed[setting.key].measurement
            click.echo(
                f"    {shown(setting)}: {measured.ratio:.2f} "
                f"[{measured.interval_low:.2f}..{measured.interval_high:.2f}]"
            )
    report |= {"seconds_grid": taken, "seconds_tuned": times}
    if out is not None:
        out.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
