"""Which of Optuna's samplers and pruners finds good settings in few trials.

    python benchmarks/search.py --model M [--workload W]

Plain decoding of a few prompts of each class is recorded once. Then every sampler, with
every seed, searches prompt lookup and suffix for each class by replaying the record:
the objective is the predicted ratio to plain decoding, so thousands of trials take
minutes. Shown is the regret (how far below the best ratio that any search found the
best of the first 5, 10, 20 and 40 trials is), what choosing a setting took, and what
share of the prompts was measured, as pruners spare some.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import click
import optuna

from adaptspec.decoding.engine import Engine
from adaptspec.host import Host
from adaptspec.model.hardware_costs import measure_costs
from adaptspec.model.loading import load_model
from adaptspec.workloads import Prompt, example_workload, read_workload
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Profiler, Setting
from adaptspec_tuner.replaying.replayer import Replayer
from adaptspec_tuner.searching.space import defaults, suggest, tuned

STRATEGIES = ("prompt_lookup", "suffix")
MARKS = (5, 10, 20, 40)

Samplers = Mapping[str, Callable[[int], optuna.samplers.BaseSampler]]
SAMPLERS: Samplers = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "TPE univariate": lambda seed: optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=4, multivariate=False
    ),
    "TPE multivariate": lambda seed: optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=4, multivariate=True, group=True
    ),
    "GP": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=4),
}
PRUNERS: Mapping[str, Callable[[], optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=2),
    "Wilcoxon 0.1": lambda: optuna.pruners.WilcoxonPruner(p_threshold=0.1),
    "Wilcoxon 0.2": lambda: optuna.pruners.WilcoxonPruner(p_threshold=0.2),
}
DEFAULT_SAMPLER, DEFAULT_PRUNER = "TPE multivariate", "none"


class Objective:
    """The predicted ratios of one strategy's settings on one class's prompts."""

    def __init__(
        self, replayer: Replayer, name: str, prompts: Sequence[Prompt]
    ) -> None:
        self.params = Host.installed().strategy(name).Params
        self._replayer, self._name, self._prompts = replayer, name, prompts
        self._plain = {p.id: replayer.measure(PLAIN_SETTING, p) for p in prompts}
        self._known: dict[str, list[float]] = {}

    def ratios(self, values: Mapping[str, Any]) -> list[float]:
        """Logarithm of each prompt's ratio; what was tried before is remembered."""
        setting = Setting(self._name, dict(values))
        if setting.key not in self._known:
            self._replayer.forget()
            self._known[setting.key] = [
                math.log(
                    max(
                        1e-6, self._replayer.measure(setting, p).gain(self._plain[p.id])
                    )
                )
                for p in self._prompts
            ]
        return self._known[setting.key]


def search(
    objective: Objective, sampler: Any, pruner: Any, trials: int
) -> tuple[list[float], float, float]:
    """Best ratio after each trial, seconds of choosing, share of prompts measured."""
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.enqueue_trial(tuned(objective.params, defaults(objective.params)))
    found: list[float] = []
    choosing, measured, whole = 0.0, 0, 0
    for _ in range(trials):
        started = perf_counter()
        asked = study.ask()
        values = suggest(objective.params, asked)
        choosing += perf_counter() - started
        logs = objective.ratios(values)
        state = optuna.trial.TrialState.COMPLETE
        used = len(logs)
        for step, value in enumerate(logs):
            # Wilcoxon compares prompt by prompt, the others the mean so far.
            paired = isinstance(pruner, optuna.pruners.WilcoxonPruner)
            asked.report(value if paired else mean(logs[: step + 1]), step)
            if step + 1 < len(logs) and asked.should_prune():
                state, used = optuna.trial.TrialState.PRUNED, step + 1
                break
        measured, whole = measured + used, whole + len(logs)
        done = state == optuna.trial.TrialState.COMPLETE
        study.tell(asked, mean(logs) if done else None, state=state)
        ratio = math.exp(mean(logs)) if done else 0.0
        found.append(max([ratio, *found[-1:]]))
    return found, choosing, measured / whole


@click.command()
@click.option("--model", required=True)
@click.option("--workload", type=Path, help="Default: the examples.")
@click.option("--classes", default="chat,code_edit,json,summarization")
@click.option("--limit", default=4, show_default=True, help="Prompts per class.")
@click.option("-n", "--max-new-tokens", default=48, show_default=True)
@click.option("--seeds", default=5, show_default=True)
@click.option("--trials", default=40, show_default=True)
def main(
    model: str,
    workload: Path | None,
    classes: str,
    limit: int,
    max_new_tokens: int,
    seeds: int,
    trials: int,
) -> None:
    """Compare samplers and pruners on replayed trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")
    host = Host.installed()
    target = load_model(model)
    engine = Engine(target)
    profiler = Profiler(engine, host, max_new_tokens)
    read = example_workload() if workload is None else read_workload(workload)
    chosen = {
        name: read.by_class()[name][:limit]
        for name in (part.strip() for part in classes.split(","))
    }
    recordings = {}
    for prompts in chosen.values():
        for prompt in prompts:
            sample = profiler.measure(PLAIN_SETTING, prompt)
            recordings[prompt.id] = profiler.recording(prompt, sample)
    replayer = Replayer(engine, host, measure_costs(target).target, recordings)
    objectives = {
        (name, strategy): Objective(replayer, strategy, prompts)
        for name, prompts in chosen.items()
        for strategy in STRATEGIES
    }

    runs: dict[tuple[str, str], list[tuple[Any, list[float]]]] = {}
    costs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    pairs = [(name, DEFAULT_PRUNER) for name in SAMPLERS]
    pairs += [(DEFAULT_SAMPLER, name) for name in PRUNERS if name != DEFAULT_PRUNER]
    for pair in pairs:
        for key, objective in objectives.items():
            for seed in range(seeds):
                sampler = SAMPLERS[pair[0]](seed)
                found, choosing, share = search(
                    objective, sampler, PRUNERS[pair[1]](), trials
                )
                runs.setdefault(pair, []).append((key, found))
                costs.setdefault(pair, []).append((choosing / trials, share))
    best = {
        key: max(found[-1] for pair in pairs for k, found in runs[pair] if k == key)
        for key in objectives
    }
    marks = [mark for mark in MARKS if mark <= trials]
    head = "  ".join(f"{f'after {m}':>9}" for m in marks)
    click.echo(f"{'sampler':18}{'pruner':14}{head}   ms/choice   prompts measured")
    for pair in pairs:
        regrets = [
            mean(1 - found[mark - 1] / best[key] for key, found in runs[pair])
            for mark in marks
        ]
        shown = "  ".join(f"{value:9.2%}" for value in regrets)
        taken = mean(choosing for choosing, _ in costs[pair])
        share = mean(share for _, share in costs[pair])
        click.echo(f"{pair[0]:18}{pair[1]:14}{shown}{1e3 * taken:12.1f}{share:19.0%}")


if __name__ == "__main__":
    main()
