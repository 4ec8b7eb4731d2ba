"""What a short tune chooses against the best that a long one found, measured again.

    ADAPTSPEC_DB=short.db adaptspec tune
    ADAPTSPEC_DB=long.db adaptspec tune --budget 1h
    python benchmarks/longer_tune.py short.db long.db [--model M] [--workload W]

For every class the short tune's choice, the long tune's choice and the next best
settings of the long tune decode the held-out prompts step by step in turns with plain
decoding. The best of the long tune is the highest of the ratios measured here, so it
has its luck with it; the ratio to the long tune's own choice has none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click

from adaptspec.decoding.engine import Engine
from adaptspec.default_model import default_model_path
from adaptspec.environment import environment_of
from adaptspec.host import Host
from adaptspec.model.hardware_costs import stored_costs, use_costs
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.profile import EVERY_CLASS, PLAIN, ProfileStore
from adaptspec.selector import select
from adaptspec.workloads import example_workload, read_workload, split
from adaptspec_tuner.confirming.confirm import confirm
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Profiler, Setting


def chosen(
    store: ProfileStore, model: LanguageModel, draft: LanguageModel | None, name: str
) -> Setting:
    """What a decoder would decode prompts of a class with."""
    choices = store.choices(model=model.digest)
    found = select(choices, environment_of(model, draft), name)
    return Setting(found.strategy, dict(found.params))


def best_measured(
    store: ProfileStore, host: Host, engine: Engine, name: str, count: int
) -> list[Setting]:
    """The settings of a class with the highest ratios that a tune confirmed, of those
    that can run on these models."""
    model, draft = engine.model, engine.draft
    profiles = [
        profile
        for profile in store.profiles(model=model.digest)
        if profile.prompt_class == name
        and profile.lossless
        and not profile.baseline
        and profile.strategy != PLAIN
        and host.strategy(profile.strategy).unavailable(model, draft) is None
    ]
    profiles.sort(key=lambda profile: -profile.measurement.ratio)
    return [Setting(p.strategy, dict(p.params)) for p in profiles[:count]]


def compared(
    ratios: Mapping[str, float], short: str, long: str, others: Sequence[str]
) -> tuple[float, float]:
    """The short tune's ratio over that of the long tune's choice, and over the best."""
    best = max(ratios[key] for key in (long, *others))
    return ratios[short] / ratios[long], ratios[short] / best


def told(name: str, values: Sequence[float]) -> str:
    """The mean over classes with its standard error."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{name}: {fmean(values):.3f} ± {error:.3f} over {len(values)} classes"


@click.command()
@click.argument("short")
@click.argument("long")
@click.option("--model", help="Default: the embedded one.")
@click.option("--draft-model")
@click.option("--workload", type=Path, help="Default: the examples.")
@click.option("--others", default=2, show_default=True, help="Of the long tune's best.")
@click.option("--repeats", default=2, show_default=True)
@click.option("--max-new-tokens", default=64, show_default=True)
@click.option("--json", "out", type=Path)
def main(
    short: str,
    long: str,
    model: str | None,
    draft_model: str | None,
    workload: Path | None,
    others: int,
    repeats: int,
    max_new_tokens: int,
    out: Path | None,
) -> None:
    """Compare the choices of a SHORT and a LONG tune, each a database."""
    host = Host.installed()
    target = load_model(model or default_model_path(lambda line: click.echo(line)))
    draft = load_model(draft_model) if draft_model else None
    read = example_workload() if workload is None else read_workload(workload)
    held_out = split(read)[1].by_class()
    engine = Engine(target, draft)
    profiler = Profiler(engine, host, max_new_tokens)
    plain = PLAIN_SETTING.key
    found: dict[str, dict[str, Any]] = {}
    with (
        closing(host.open_store(short)) as short_store,
        closing(host.open_store(long)) as long_store,
    ):
        costs = stored_costs(long_store, environment_of(target, draft))
        if costs is not None:
            use_costs(costs, target, draft)
        for name, prompts in held_out.items():
            if name == EVERY_CLASS:
                continue
            mine = chosen(short_store, target, draft, name)
            theirs = chosen(long_store, target, draft, name)
            best = best_measured(long_store, host, engine, name, others)
            unique = {s.key: s for s in (mine, theirs, *best) if s.key != plain}
            measured = confirm(
                profiler,
                list(unique.values()),
                prompts,
                repeats=repeats,
                in_time=lambda seconds, count: True,
                warn=click.echo,
            )
            ratios = {key: told.measurement.ratio for key, told in measured.items()}
            ratios[plain] = 1.0
            keys = [setting.key for setting in best]
            to_choice, to_best = compared(ratios, mine.key, theirs.key, keys)
            found[name] = {
                "short": [mine.key, ratios[mine.key]],
                "long": [theirs.key, ratios[theirs.key]],
                "best": max((ratios[key], key) for key in [theirs.key, *keys]),
                "to_choice": to_choice,
                "to_best": to_best,
            }
            click.echo(
                f"{name}: short {mine.strategy} {ratios[mine.key]:.2f}x, long "
                f"{theirs.strategy} {ratios[theirs.key]:.2f}x, best "
                f"{Setting.from_key(found[name]['best'][1]).strategy} "
                f"{found[name]['best'][0]:.2f}x"
            )
            if out is not None:
                out.write_text(json.dumps(found, indent=2))
    click.echo(
        told("short / long tune's choice", [f["to_choice"] for f in found.values()])
    )
    click.echo(told("short / best of the long", [f["to_best"] for f in found.values()]))


if __name__ == "__main__":
    main()
