"""What classes found from prompts' texts gain over one class of them all.

    python benchmarks/classing.py --model M --workload W --record FILE

Prompts are decoded plainly once and settings replayed on them: for every prompt and
setting a predicted ratio to plain decoding. Then, for each seed, half of the prompts
are tuned on: classes are discovered there as `adaptspec tune --classes auto` does it,
and each gets the setting that is best for its tuning prompts. What counts is what these
settings gain on the other half (geometric mean). Beside the discovered classes: those
that the workload declares, one class of all prompts, and the best setting of every
single prompt, which nobody can know. ``unknown`` prompts are decoded plainly; a line
says what they would gain with the best setting of all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev

import click
from rich.console import Console
from rich.table import Table

from adaptspec.decoding.engine import Engine
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.model.hardware_costs import ForwardCosts
from adaptspec.model.loading import load_model
from adaptspec.strategy import Strategy
from adaptspec.workloads import DEFAULT_CLASS, Prompt, Workload, read_workload
from adaptspec.workloads import split as divided
from adaptspec_tuner.classes.discover import (
    classified,
    discover,
    probed,
    replayed_gains,
)
from adaptspec_tuner.measuring.profiler import Recording, Setting
from adaptspec_tuner.replaying.replayer import Replayer
from adaptspec_tuner.searching.space import suggest
from recorded import record

STRATEGIES = ("prompt_lookup", "suffix", "draft_model")  # the last with a draft model
DECLARED, TEXT, ONE, EACH = "declared", "text", "one class", "each prompt its best"
NOT_UNKNOWN = "text, unknown by the best of all"

# Prompt id -> setting -> logarithm of the ratio to plain decoding.
Logs = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Outcome:
    """What a way of telling classes came to with one seed.

    Args:
        gain: Geometric mean of the held-out prompts' ratios to plain decoding.
        classes: How many.
        unknown: Share of the held-out prompts.
        seconds: Of classifying a prompt.
    """

    gain: float
    classes: int = 1
    unknown: float = 0.0
    seconds: float = 0.0


def pool(strategy: type[Strategy], count: int, seed: int) -> list[Setting]:
    """Settings that tell prompts apart, and ``count`` drawn from the declared space."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    drawn = [
        Setting(strategy.name, suggest(strategy.Params, study.ask()))
        for _ in range(count)
    ]
    found = {setting.key: setting for setting in [*probed(strategy), *drawn]}
    return list(found.values())


def best(prompts: Sequence[Prompt], logs: Logs) -> str | None:
    """The setting with the highest mean; None where that is plain decoding."""
    totals: dict[str, float] = {}
    for prompt in prompts:
        for key, value in logs[prompt.id].items():
            totals[key] = totals.get(key, 0.0) + value
    if not totals:
        return None
    first = max(totals, key=lambda key: totals[key])
    return first if totals[first] > 0 else None


def gained(
    tuning: Sequence[Prompt], held_out: Sequence[Prompt], logs: Logs, other: str | None
) -> float:
    """Geometric mean over ``held_out``, each class with its own best setting.

    Args:
        other: The setting of prompts of no class that was tuned on.
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in tuning:
        groups.setdefault(prompt.prompt_class, []).append(prompt)
    chosen = {name: best(group, logs) for name, group in groups.items()}
    values = [
        logs[prompt.id].get(chosen.get(prompt.prompt_class, other) or "", 0.0)
        for prompt in held_out
    ]
    return math.exp(mean(values))


def compared(
    workload: Workload,
    ratios: Mapping[str, Mapping[str, float]],
    told: Sequence[str],
    seed: int,
) -> dict[str, Outcome]:
    """Each way of telling classes, on one division of the prompts.

    Args:
        ratios: Prompt id -> setting -> ratio to plain decoding.
        told: Settings by which classes are discovered.
    """
    logs = {
        name: {key: math.log(max(ratio, 1e-6)) for key, ratio in found.items()}
        for name, found in ratios.items()
    }
    declared = {prompt.id: prompt.prompt_class for prompt in workload.prompts}
    alike = tuple(replace(p, prompt_class=DEFAULT_CLASS) for p in workload.prompts)
    tuning, held_out = divided(replace(workload, prompts=alike), seed)
    everybody = best(tuning.prompts, logs)
    found = {
        ONE: Outcome(gained(tuning.prompts, held_out.prompts, logs, None)),
        EACH: Outcome(
            math.exp(mean(max(0.0, *logs[p.id].values()) for p in held_out.prompts)),
            len(held_out.prompts),
        ),
    }
    by_hand = [
        [replace(p, prompt_class=declared[p.id]) for p in part.prompts]
        for part in (tuning, held_out)
    ]
    found[DECLARED] = Outcome(
        gained(by_hand[0], by_hand[1], logs, None),
        len({prompt.prompt_class for prompt in by_hand[0]}),
    )
    few = {
        p.id: {key: ratios[p.id][key] for key in told if key in ratios[p.id]}
        for p in tuning.prompts
    }
    classifier = discover(tuning.prompts, few, seed).classifier
    sides = [classified(part, classifier) for part in (tuning, held_out)]
    known = [p for p in sides[0].prompts if p.prompt_class in classifier.names]
    strange = [p for p in sides[1].prompts if p.prompt_class not in classifier.names]
    found[TEXT] = Outcome(
        gained(known, sides[1].prompts, logs, None),
        len(classifier.names),
        len(strange) / len(held_out.prompts),
        classifier.seconds,
    )
    found[NOT_UNKNOWN] = replace(
        found[TEXT], gain=gained(known, sides[1].prompts, logs, everybody)
    )
    return found


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return form(mean(values))
    return f"{form(mean(values))} ± {form(stdev(values))}"


@click.command()
@click.option("-m", "--model", "model_path", required=True, help="Model folder.")
@click.option("--draft-model", "draft_path", help="Draft model folder.")
@click.option("--workload", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--record", "at", required=True, type=click.Path(path_type=Path))
@click.option("--per-class", default=20, show_default=True)
@click.option("--max-prompt-tokens", default=700, show_default=True)
@click.option("-n", "--max-new-tokens", default=64, show_default=True)
@click.option("--settings", default=20, show_default=True, help="Drawn per strategy.")
@click.option("--seeds", default=10, show_default=True, help="Divisions.")
def main(
    model_path: str,
    draft_path: str | None,
    workload: Path,
    at: Path,
    per_class: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    settings: int,
    seeds: int,
) -> None:
    """Held-out gain of discovered classes, a line for each way of telling them."""
    host = Host.installed()
    model = load_model(model_path)
    engine = Engine(model, load_model(draft_path) if draft_path else None)
    read = read_workload(workload)
    kept = record(engine, read, per_class, max_prompt_tokens, max_new_tokens, at)
    answers = kept["answers"]
    taken = replace(read, prompts=tuple(p for p in read.prompts if p.id in answers))
    recordings = {
        prompt.id: Recording(
            answers[prompt.id]["prompt"], answers[prompt.id]["tokens"], max_new_tokens
        )
        for prompt in taken.prompts
    }
    costs = kept["costs"]
    draft_costs = ForwardCosts(**costs["draft"]) if costs.get("draft") else None
    replayer = Replayer(
        engine, host, ForwardCosts(**costs["target"]), recordings, draft_costs
    )
    strategies = [
        cls
        for cls in map(host.strategy, STRATEGIES)
        if cls.unavailable(model, engine.draft) is None
    ]
    tried = [one for cls in strategies for one in pool(cls, settings, seed=0)]
    # Suffix remembers earlier outputs, so that neighbours in the file don't help it.
    mixed = list(taken.prompts)
    random.Random(0).shuffle(mixed)
    ratios = replayed_gains(replayer, tried, mixed, lambda: True)
    told = [one.key for cls in strategies for one in probed(cls)]
    outcomes = [compared(taken, ratios, told, seed) for seed in range(seeds)]

    click.echo(
        f"{len(taken.prompts)} prompts of {len(taken.classes)} declared classes, "
        f"{len(tried)} settings of {', '.join(cls.name for cls in strategies)}, "
        f"{seeds} divisions; mean and standard deviation"
    )
    table = Table()
    for column in ("classes told by", "gain", "classes", "unknown", "ms a prompt"):
        table.add_column(column)
    names = (ONE, DECLARED, *outcomes[0])
    for name in dict.fromkeys(names):
        some = [found[name] for found in outcomes]
        table.add_row(
            name,
            spread([one.gain for one in some], lambda value: f"{value:.3f}"),
            spread([one.classes for one in some], lambda value: f"{value:.1f}"),
            f"{mean(one.unknown for one in some):.1%}",
            f"{1e3 * median(one.seconds for one in some):.2f}",
        )
    Console(width=110).print(table, markup=False)
    for one, other in ((TEXT, ONE), (TEXT, DECLARED)):
        ratio = [found[one].gain / found[other].gain for found in outcomes]
        click.echo(
            f"{one} / {other}: {spread(ratio, lambda value: f'{value:.3f}')}, above 1 "
            f"in {sum(value > 1 for value in ratio)} of {len(ratio)}"
        )


if __name__ == "__main__":
    try:
        main()
    except AdaptSpecError as error:
        raise SystemExit(f"Error: {error}") from None
