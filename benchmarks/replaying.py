"""How many settings a minute the tuner tries against recorded answers.

    python benchmarks/replaying.py --model M --workload W --record FILE

Prompts are taken from the workload's classes in turn and decoded plainly once. Then
the very search that `adaptspec tune` makes without the target runs for prompt lookup
and suffix. Three readings: as `tune` does it, a search for each class on its tuning
prompts; one on all prompts, hopeless settings ended early as always; and the settings
of that search replayed again on every prompt, none ended early, nothing chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from time import perf_counter

import click
from rich.console import Console
from rich.table import Table

from adaptspec.decoding.engine import Engine
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.model.hardware_costs import ForwardCosts
from adaptspec.model.loading import load_model
from adaptspec.strategy import Strategy
from adaptspec.workloads import Prompt, read_workload, split
from adaptspec_tuner.measuring.profiler import Recording, Setting
from adaptspec_tuner.replaying.presearch import TRIALS, Presearch, presearch
from adaptspec_tuner.replaying.replayer import Replayer
from recorded import record

STRATEGIES = ("prompt_lookup", "suffix")
EVERY = "every prompt"  # one class of all


def searched(
    replayer: Replayer,
    strategies: Sequence[type[Strategy]],
    prompts: Mapping[str, Sequence[Prompt]],
    trials: int,
) -> Presearch:
    """The tuner's search, with nothing left from an earlier one."""
    replayer.forget()
    return presearch(
        replayer,
        strategies,
        {name: list(group) for name, group in prompts.items()},
        in_time=lambda: True,
        clock=perf_counter,
        warn=lambda text: click.echo(text, err=True),
        trials=trials,
    )


def row(label: str, strategy: str, tried: Presearch) -> tuple[str, ...]:
    """Rate of a search, and the prompts that its trials ran on."""
    ran = [len(t.detail["ratios"]) for found in tried.tried.values() for t in found]
    return (
        *(label, strategy, str(tried.trials), f"{mean(ran):.1f}"),
        *(f"{tried.seconds:.1f}", f"{60 * tried.trials / tried.seconds:.0f}"),
    )


def whole(
    replayer: Replayer, tried: Presearch, prompts: Sequence[Prompt]
) -> tuple[int, float]:
    """Trials over all prompts, and the seconds they take."""
    settings = [
        Setting(name, dict(trial.params))
        for (_, name), found in tried.tried.items()
        for trial in found
    ]
    started = perf_counter()
    for setting in settings:
        replayer.forget()
        for prompt in prompts:
            replayer.measure(setting, prompt)
    return len(settings), perf_counter() - started


@click.command()
@click.option("-m", "--model", "model_path", required=True, help="Model folder.")
@click.option("--workload", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--record", "at", required=True, type=click.Path(path_type=Path))
@click.option("--prompts", "count", default=50, show_default=True, help="In all.")
@click.option("--max-prompt-tokens", default=700, show_default=True)
@click.option("-n", "--max-new-tokens", default=64, show_default=True)
@click.option("--trials", default=TRIALS, show_default=True, help="Of each search.")
def main(
    model_path: str,
    workload: Path,
    at: Path,
    count: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    trials: int,
) -> None:
    """Trials a minute, a line for each search."""
    host = Host.installed()
    model = load_model(model_path)
    engine = Engine(model)
    read = read_workload(workload)
    short = [p for p in read.prompts if len(p.encode(model)) <= max_prompt_tokens]
    taken = replace(read, prompts=tuple(short)).limit(count)
    kept = record(engine, taken, count, max_prompt_tokens, max_new_tokens, at)
    recordings = {
        prompt.id: Recording(
            kept["answers"][prompt.id]["prompt"],
            kept["answers"][prompt.id]["tokens"],
            max_new_tokens,
        )
        for prompt in taken.prompts
    }
    costs = ForwardCosts(**kept["costs"]["target"])
    replayer = Replayer(engine, host, costs, recordings)
    tuning, _ = split(taken)
    tokens = sum(len(one.tokens) for one in recordings.values())
    click.echo(
        f"{len(recordings)} prompts of {len(taken.classes)} classes, "
        f"{sum(len(one.prompt) for one in recordings.values())} tokens, "
        f"answered by {tokens}; {len(tuning.prompts)} to tune on"
    )
    table = Table()
    for column in (
        *("search", "strategy", "trials", "prompts a trial", "seconds"),
        "trials a minute",
    ):
        table.add_column(column)
    classes = [host.strategy(name) for name in STRATEGIES]
    everything = {EVERY: taken.prompts}
    for label, prompts in (
        ("each class", tuning.by_class()),
        (EVERY, everything),
    ):
        for some in ([classes[0]], [classes[1]], classes):
            tried = searched(replayer, some, prompts, trials)
            names = " and ".join(cls.name for cls in some)
            table.add_row(*row(label, names, tried))
            if label == EVERY and len(some) == 1:
                number, seconds = whole(replayer, tried, taken.prompts)
                table.add_row(
                    *("every prompt to its end, nothing chosen", names, str(number)),
                    *(f"{len(taken.prompts)}", f"{seconds:.1f}"),
                    f"{60 * number / seconds:.0f}",
                )
    Console(width=120).print(table, markup=False)


if __name__ == "__main__":
    try:
        main()
    except AdaptSpecError as error:
        raise SystemExit(f"Error: {error}") from None
