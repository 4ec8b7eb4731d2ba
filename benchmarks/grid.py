"""Tuning against an exhaustive grid: how near to its best, in a tenth of its time.

    python benchmarks/grid.py --model M --draft-model D --json OUT [--workload W]

The grid measures every setting of prompt lookup and the draft model on the tuning half
of each class, as `tune` splits it. Then `tune` runs with several seeds, each in a tenth
of the grid's time, from an empty store but for the hardware costs, which are measured
once and told apart. At last the grid's best settings of each class, what each seed
found and plain decoding are measured interleaved on the held-out half.

Everything measured is in OUT at once: stopped, the same command continues.
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
from adaptspec.environment import environment_of
from adaptspec.host import Host
from adaptspec.model.hardware_costs import HardwareCosts, measure_costs, store_costs
from adaptspec.model.loading import load_model
from adaptspec.params import Scalar
from adaptspec.workloads import Prompt, Workload, example_workload, read_workload, split
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.confirming.confirm import confirm
from adaptspec_tuner.measuring.bootstrap import overall
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Profiler, Setting
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.reporting.result import told_errors
from adaptspec_tuner.tune import tune

AXES: Mapping[str, Mapping[str, Sequence[Scalar]]] = {
    "prompt_lookup": {
        "draft_length": (2, 3, 5, 8, 12, 16, 24),
        "max_ngram": (3, 4, 6),
        "branches": (1, 3),
    },
    "draft_model": {"draft_length": (1, 2, 3, 4, 6, 8), "stop": (0.0, 0.4, 0.7)},
}
SETTINGS_BETWEEN_PLAIN = 11  # settings between two measurements of plain decoding
TUNING_SHARE = 0.1  # of the grid's time, for one tuning
SETTINGS_COMPARED = 2  # of the grid, compared on held-out prompts


def grid(host: Host) -> list[Setting]:
    """Every combination, the other parameters at their defaults."""
    found = []
    for name, axes in AXES.items():
        params = host.strategy(name).Params
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            found.append(Setting(name, params.parse(chosen, name).model_dump()))
    return found


class Progress:
    """What was measured, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.state: dict[str, Any] = {
            "costs": None,
            "grid": {},  # class -> setting key -> ratio to plain decoding
            "seconds_grid": 0.0,
            "tuned": [],  # of each seed, what `tune` found and took
            "confirmed": {},  # class -> setting key -> ratio, interval
        }
        if path.exists():
            self.state = json.loads(path.read_text())

    def save(self) -> None:
        """Keep it."""
        self._path.write_text(json.dumps(self.state, indent=2))


def measure_block(
    profiler: Profiler, settings: Sequence[Setting], prompts: Sequence[Prompt]
) -> dict[str, float]:
    """Ratio to plain decoding of each setting, plain measured with them, so that the
    machine's moods favour none."""
    plain = {p.id: profiler.measure(PLAIN_SETTING, p) for p in prompts}
    found = {}
    for setting in settings:
        profiler.forget()
        gains = [[profiler.measure(setting, p).gain(plain[p.id])] for p in prompts]
        found[setting.key] = overall(gains)
    return found


def shown(setting: Setting) -> str:
    """Its varied parameters."""
    names = AXES.get(setting.strategy, setting.params)
    return f"{setting.strategy} " + " ".join(f"{n}={setting.params[n]}" for n in names)


def run_grid(
    progress: Progress,
    profiler: Profiler,
    settings: Sequence[Setting],
    classes: Mapping[str, Sequence[Prompt]],
) -> None:
    """Every setting on every class, in blocks."""
    state = progress.state
    for at in range(0, len(settings), SETTINGS_BETWEEN_PLAIN):
        for name, prompts in classes.items():
            known = state["grid"].setdefault(name, {})
            block = [
                s
                for s in settings[at : at + SETTINGS_BETWEEN_PLAIN]
                if s.key not in known
            ]
            if not block:
                continue
            started = perf_counter()
            known |= measure_block(profiler, block, prompts)
            state["seconds_grid"] += perf_counter() - started
            progress.save()
    for name, known in state["grid"].items():
        for key in best(known, 3):
            click.echo(f"grid {name}: {known[key]:.2f} {shown(Setting.from_key(key))}")
    click.echo(
        f"grid: {len(settings)} settings x {len(classes)} classes in "
        f"{state['seconds_grid']:.0f} s"
    )


def best(ratios: Mapping[str, float], count: int) -> list[str]:
    """Keys of the highest ratios."""
    return sorted(ratios, key=lambda key: -ratios[key])[:count]


def compare(
    progress: Progress,
    profiler: Profiler,
    name: str,
    prompts: Sequence[Prompt],
    repeats: int,
) -> None:
    """The grid's best and what the seeds found, interleaved on held-out prompts."""
    state = progress.state
    keys, plain = best(state["grid"][name], SETTINGS_COMPARED), PLAIN_SETTING.key
    # What isn't confirmed is decoded plainly.
    found = [told["classes"].get(name, plain) for told in state["tuned"]]
    unique = dict.fromkeys([*keys, *(key for key in found if key != plain)])
    if name not in state["confirmed"]:
        confirmed = confirm(
            profiler,
            [Setting.from_key(key) for key in unique],
            prompts,
            repeats=repeats,
            in_time=lambda seconds, count: True,
            warn=click.echo,
        )
        state["confirmed"][name] = {
            key: [m.ratio, m.interval_low, m.interval_high]
            for key, told in confirmed.items()
            for m in [told.measurement]
        }
        progress.save()
    measured = state["confirmed"][name]
    # Plain decoding is a choice, too, of the grid's as well.
    ratio = {key: told[0] for key, told in measured.items()} | {plain: 1.0}
    top = max(1.0, *(ratio[key] for key in keys))
    ours = [ratio[key] for key in found]
    winners = [Setting.from_key(key).strategy for key in found]
    most = max((winners.count(w) for w in winners), default=0)
    click.echo(
        f"{name}: grid's best {top:.2f}; tuned {', '.join(f'{v:.2f}' for v in ours)}; "
        f"median of tuned to best {median(ours) / top if ours else 0:.3f}; same winner "
        f"in {most} of {len(found)}"
    )
    for key in unique:
        low, high = measured[key][1:]
        click.echo(
            f"    {shown(Setting.from_key(key))}: {ratio[key]:.2f} "
            f"[{low or 0:.2f}..{high or 0:.2f}]"
        )


@click.command()
@click.option("--model", required=True)
@click.option("--draft-model", required=True)
@click.option("--workload", type=Path, help="Default: the examples.")
@click.option("--classes", default="chat,json,translation", show_default=True)
@click.option("--limit", default=4, show_default=True, help="Prompts per class.")
@click.option("-n", "--max-new-tokens", default=24, show_default=True)
@click.option("--seeds", default=5, show_default=True)
@click.option("--repeats", default=2, show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--json", "out", type=Path, required=True, help="Continued if there.")
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
    out: Path,
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
    tuning, held_out = split(chosen)
    progress = Progress(out)
    state = progress.state

    run_grid(progress, profiler, grid(host), tuning.by_class())
    if state["costs"] is None:
        state["costs"] = measure_costs(target, draft).as_json()
        progress.save()
    costs = HardwareCosts.from_json(state["costs"])
    click.echo(f"hardware costs: {costs.seconds:.0f} s, once for all")

    budget = state["seconds_grid"] * TUNING_SHARE
    for seed in range(len(state["tuned"]), seeds):
        store = MemoryStore()
        store_costs(store, environment_of(target, draft), costs)
        began = perf_counter()
        result = tune(
            target,
            draft,
            chosen,
            TuneOptions(
                budget=budget,
                strategies=list(AXES),
                seed=seed,
                max_new_tokens=max_new_tokens,
            ),
            db=store,
            host=host,
        )
        found = {
            told.name: Setting(told.choice.strategy, dict(told.choice.params)).key
            for told in result.classes
        }
        state["tuned"].append(
            {
                "seconds": perf_counter() - began,
                "classes": found,
                "reasons": {told.name: told.choice.reason for told in result.classes},
                "notes": list(result.notes),
                "predictions": result.prediction_errors,
                "spent": dict(result.spent),
                "measured": {
                    told.name: [
                        [
                            Setting(row.strategy, row.profile.params).key,
                            row.measurement.ratio,
                            row.predicted,
                        ]
                        for row in told.rows
                    ]
                    for told in result.classes
                },
            }
        )
        progress.save()
    for seed, told in enumerate(state["tuned"]):
        for name, reason in told["reasons"].items():
            strategy = Setting.from_key(told["classes"][name]).strategy
            click.echo(f"seed {seed} {name}: {strategy}: {reason}")
        for note in told["notes"]:
            click.echo(f"seed {seed}: {note}")
        click.echo(f"seed {seed}: {told['seconds']:.0f} s of {budget:.0f} s")
    errors = [(e, same) for told in state["tuned"] for e, same in told["predictions"]]
    click.echo(f"all seeds: {told_errors(errors)}")

    for name in wanted:
        compare(progress, profiler, name, held_out.by_class()[name], repeats)


if __name__ == "__main__":
    main()
