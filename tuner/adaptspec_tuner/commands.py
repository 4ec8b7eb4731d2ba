"""``adaptspec tune``: measure, search, confirm, store and show."""

from __future__ import annotations

import math
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptspec.cli.output import (
    print_json,
    stderr_console,
    stdout_console,
    without_loading_bars,
)
from adaptspec.cli.quantities import duration, parse_memory
from adaptspec.errors import AdaptSpecError

if TYPE_CHECKING:
    from adaptspec.host import Host
    from adaptspec_tuner.reporting.result import TuneResult


def parse_budget(text: str) -> tuple[float, int | None]:
    """Seconds of ``90s``, ``10m``, ``1.5h`` (a bare number is minutes), or trials.

    ``60 trials`` is as many measured trials, whatever time they take.
    """
    if (seconds := duration(text)) is not None:
        return seconds, None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*trials?\s*", text)
    if found is None or float(found[1]) <= 0:
        raise AdaptSpecError(
            "--budget must be a time such as 90s, 10m or 1h, or a number of trials "
            f"such as '60 trials', got {text!r}"
        )
    if "." in found[1]:
        raise AdaptSpecError(f"--budget must be a whole number of trials, got {text!r}")
    return math.inf, int(found[1])


@click.command()
@click.option("-m", "--model", help="Model folder; default: the embedded model.")
@click.option("--draft-model", help="Draft model folder, best of the same vocabulary.")
@click.option(
    "--heads", multiple=True, metavar="DIR", help="Heads trained for the model."
)
@click.option("--workload", type=Path, help="JSON lines; default: the examples.")
@click.option(
    "--budget",
    default="8m",
    show_default=True,
    help="90s, 10m, 1h..., or '60 trials' in all.",
)
@click.option(
    "--objective",
    type=click.Choice(["speed", "latency"]),
    default="speed",
    show_default=True,
    help="Tokens per second, or the 95th percentile of the time per token.",
)
@click.option(
    "--classes",
    type=click.Choice(["declared", "auto"]),
    default="declared",
    show_default=True,
    help="As the workload says, or discovered from the prompts.",
)
@click.option("--max-memory", help="Refuse settings that take more: 6GiB, 800MiB...")
@click.option("--db", help="Profile database: path or SQLAlchemy URL.")
@click.option("--strategies", help="Only these, separated by commas.")
@click.option(
    "--allow-lossy",
    is_flag=True,
    help="Measure, never choose, strategies that change sampled output.",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=40,
    show_default=True,
    help="Most trials per class and strategy.",
)
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="For prompts that don't say.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="auto: as the weights are stored.",
)
@click.option("--device", help="Default: CUDA if there is one, else the CPU.")
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run code that comes with a model. Only for models you trust.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the search.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Most prompts per class. A strategy needs 4, 2 of them held out, to win.",
)
@click.option(
    "--skip-bad",
    is_flag=True,
    help="Leave out prompts that can't be read or decoded; they are counted.",
)
@click.option("--raw", is_flag=True, help="Don't apply the chat template to texts.")
@click.option("--baselines/--no-baselines", help="Measure other engines beside.")
@click.option("--fresh", is_flag=True, help="Forget an earlier run like this.")
@click.option(
    "--worker",
    is_flag=True,
    help="Run trials of an equal tune, started elsewhere on the same --db, or on what "
    "`profiles serve` serves (grpc://HOST:PORT).",
)
@click.option(
    "--ray",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="auto",
    help="Run trials on a Ray cluster's nodes of this machine's kind.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def tune(
    host: Host,
    model: str | None,
    draft_model: str | None,
    heads: tuple[str, ...],
    workload: Path | None,
    budget: str,
    objective: str,
    classes: str,
    max_memory: str | None,
    db: str | None,
    strategies: str | None,
    allow_lossy: bool,
    trials: int,
    max_new_tokens: int,
    dtype: str,
    device: str | None,
    trust_remote_code: bool,
    threads: int | None,
    seed: int,
    limit: int | None,
    skip_bad: bool,
    raw: bool,
    baselines: bool,
    fresh: bool,
    worker: bool,
    ray: str | None,
    as_json: bool,
) -> None:
    """Find the fastest lossless strategy for each class of your prompts.

    Stopped with Ctrl-C or cut off, the same command continues.
    """
    seconds, trials_in_all = parse_budget(budget)
    most_memory = None if max_memory is None else parse_memory(max_memory)
    names = [n.strip() for n in strategies.split(",")] if strategies else None
    from adaptspec.cli.progress import Progress
    from adaptspec.workloads import example_workload, read_workload
    from adaptspec_tuner.tune import tune as run_tune
    from adaptspec_tuner.tuning_run import Interrupted, Stopped

    # A bad line is told before a model is fetched.
    prompts = (
        example_workload() if workload is None else read_workload(workload, skip_bad)
    )
    if raw:
        prompts = prompts.as_raw()
    errors = stderr_console()
    if model is None:
        from adaptspec.default_model import default_model_path

        model = str(default_model_path(lambda text: errors.print(text, markup=False)))
    try:
        with without_loading_bars():
            result = run_tune(
                model,
                draft_model,
                prompts,
                db=db,
                budget=seconds,
                budget_trials=trials_in_all,
                objective=objective,
                max_memory=most_memory,
                classes=classes,
                strategies=names,
                heads=heads,
                allow_lossy=allow_lossy,
                trials=trials,
                max_new_tokens=max_new_tokens,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                threads=threads,
                seed=seed,
                limit=limit,
                skip_bad=skip_bad,
                baselines=baselines,
                fresh=fresh,
                worker=worker,
                ray=ray,
                host=host,
                progress=Progress(errors, time.monotonic),
            )
    except Stopped as stopped:
        if stopped.result.classes:
            _show(stopped.result, as_json)
        if not isinstance(stopped, Interrupted):
            raise
        click.echo(f"Error: {stopped}", err=True)
        sys.exit(130)
    if result.classes or result.worked is not None or as_json:
        _show(result, as_json)
    if not result.classes and result.worked is None:
        raise AdaptSpecError(
            f"no class could be confirmed, so nothing is chosen: {result.notes[-1]}"
            if result.notes
            else "no class could be confirmed; give a larger --budget"
        )


def _show(result: TuneResult, as_json: bool) -> None:
    from adaptspec_tuner.reporting.tables import print_result

    if as_json:
        print_json(result.as_json())
    elif result.worked is not None:
        click.echo(f"{result.worked} trials of run {result.run}", err=True)
    else:
        print_result(result, stdout_console())


@click.command()
@click.option("--db", metavar="URL", help="Profile database: a path or SQLAlchemy URL.")
@click.option("--run", help="A tuning run; default: the newest.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one self-contained HTML file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def report(
    host: Host, db: str | None, run: str | None, output: Path | None, as_json: bool
) -> None:
    """Show what a tuning run found: speeds, costs, search, acceptance.

    Without options a table; with -o a page with plots, which needs no network.
    """
    from adaptspec_tuner.reporting.data import build

    store = host.open_store(db)
    try:
        found = build(store, run)
    finally:
        store.close()
    if output is not None:
        from adaptspec_tuner.reporting.html import render

        page = render(found)
        try:
            output.write_text(page, encoding="utf-8")
        except OSError as error:
            raise AdaptSpecError(
                f"can't write the report to {output}: {error.strerror}; give another "
                "path with -o"
            ) from None
        click.echo(f"{output} written", err=True)
    if as_json:
        print_json(found.as_json())
    elif output is None:
        from adaptspec_tuner.reporting.tables import print_report

        print_report(found, stdout_console())
