"""``adaptspec tune``: measure, search, confirm, store and show."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    get_args,
    get_origin,
    get_type_hints,
)

import click

from adaptspec.cli.output import (
    print_json,
    stderr_console,
    stdout_console,
    without_loading_bars,
)
from adaptspec.cli.quantities import duration
from adaptspec.errors import AdaptSpecError
from adaptspec.profile import OURS
from adaptspec_tuner.options import TuneOptions

if TYPE_CHECKING:
    from adaptspec.cli.progress import Progress
    from adaptspec.host import Host
    from adaptspec.workloads import Workload
    from adaptspec_tuner.reporting.result import TuneResult

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def parse_budget(text: str) -> tuple[float, int | None]:
    """Seconds of ``90s``, ``1h30m`` or ``600`` (seconds), or a number of trials.

    ``60 trials`` is as many measured trials, whatever time they take.
    """
    if (seconds := duration(text)) is not None:
        return seconds, None
    found = re.fullmatch(r"\s*(\d+)\s*trials?\s*", text, re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise AdaptSpecError(
            "--budget must be more than nothing: a time such as 90s, 1h30m or 600 "
            f"(seconds), or a whole number of trials such as '60 trials', got {text!r}"
        )
    return math.inf, int(found[1])


def option_of(name: str, default: Any, hint: Any) -> Decorator | None:
    """The command's option for a field of :class:`TuneOptions`; None without one."""
    if get_origin(hint) is not Annotated:
        return None
    known, asked = get_args(hint)
    how: dict[str, Any] = {"help": asked.help, "default": default, **asked.how}
    if known is bool:
        how["is_flag"] = True
    elif get_origin(known) is Literal:
        how |= {"type": click.Choice(get_args(known)), "show_default": True}
    elif "type" in asked.how:
        how["show_default"] = default is not None
    elif asked.least is not None:
        how |= {"type": click.IntRange(min=asked.least), "show_default": True}
    elif isinstance(default, int | str):
        how |= {"type": type(default), "show_default": True}
    flags = asked.flags or (f"--{name.replace('_', '-')}",)
    return click.option(*flags, name, **how)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for each field of :class:`TuneOptions`."""
    hints = get_type_hints(TuneOptions, include_extras=True)
    for field in reversed(fields(TuneOptions)):
        if option := option_of(field.name, field.default, hints[field.name]):
            command = option(command)
    return command


@click.command()
@click.option(
    "-m",
    "--model",
    help="Model folder, or what another engine takes; default: the embedded model.",
)
@click.option(
    "--draft-model", help="Draft model folder; best with the same vocabulary."
)
@click.option(
    "--workload",
    type=Path,
    help="JSON lines or a JSON array; - is standard input. Default: the examples.",
)
@click.option(
    "--budget",
    default="8m",
    show_default=True,
    help="90s, 10m, 1h30m, or '60 trials' in all; a bare number is seconds.",
)
@click.option("--db", help="Profile database: path or SQLAlchemy URL.")
@with_options
@click.option("--raw", is_flag=True, help="Don't apply the chat template to texts.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def tune(
    host: Host,
    /,
    model: str | None,
    draft_model: str | None,
    workload: Path | None,
    budget: str,
    db: str | None,
    raw: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Find the fastest lossless strategy for each class of your prompts.

    Stopped with Ctrl-C or cut off, the same command continues.
    """
    seconds, trials = parse_budget(budget)
    options = [
        TuneOptions(
            budget=seconds, budget_trials=trials, **{**asked, "concurrency": count}
        )
        for count in asked["concurrency"]
    ]
    first = options[0]
    from adaptspec.cli.progress import Progress
    from adaptspec.workloads import example_workload, read_workload

    # A bad line is told before a model is fetched.
    prompts = (
        example_workload()
        if workload is None
        else read_workload(workload, first.skip_bad)
    )
    if raw:
        prompts = prompts.as_raw()
    results: list[TuneResult] = []
    started = time.monotonic()
    with Progress(stderr_console(), time.monotonic) as progress:
        progress.doing("loading", first.seconds)
        from adaptspec_tuner.tuning_run import Stopped

        if model is None and first.engine == OURS:
            from adaptspec.default_model import default_model_path

            model = str(default_model_path(progress.say))
        stopped: Stopped | None = None
        failed: AdaptSpecError | None = None
        for number, one in enumerate(options):
            if len(options) > 1:
                left = max(0.0, seconds - (time.monotonic() - started))
                one = replace(one, budget=left / (len(options) - number))
            try:
                result = _tuned(host, model, draft_model, prompts, one, db, progress)
            except Stopped as error:
                stopped, result = error, error.result
            except AdaptSpecError as error:
                if len(options) == 1:
                    raise
                # What other numbers of requests gave is shown all the same.
                failed = failed or error
                progress.say(f"{at_once(one)}: {error}")
                continue
            result = _with_defaults(host, result)
            if not result.classes and stopped is None and len(options) > 1:
                why = "".join(f": {note}" for note in result.notes[-1:])
                progress.say(f"{at_once(one)}: no class could be confirmed{why}")
            results.append(result)
            if stopped is not None:
                break
    shown = [found for found in results if found.classes]
    several = len(options) > 1
    if stopped is not None:
        if shown:
            _show(shown, as_json, several)
        from adaptspec_tuner.tuning_run import Interrupted

        if not isinstance(stopped, Interrupted):
            raise stopped
        click.echo(f"Error: {stopped}", err=True)
        sys.exit(130)
    worked = all(found.worked is not None for found in results)
    if shown or worked or as_json:
        _show(shown if shown and not as_json else results, as_json, several)
    if failed is not None:
        raise failed
    if not shown and not worked:
        notes = results[-1].notes
        raise AdaptSpecError(
            f"no class could be confirmed, so nothing is chosen: {notes[-1]}"
            if notes
            else "no class could be confirmed; give a larger --budget"
        )


def at_once(options: TuneOptions) -> str:
    """At which number of requests a tune measures, in words."""
    count = options.concurrency
    return "1 request" if count == 1 else f"{count} requests at a time"


def _tuned(
    host: Host,
    model: str | None,
    draft_model: str | None,
    prompts: Workload,
    options: TuneOptions,
    db: str | None,
    progress: Progress,
) -> TuneResult:
    """What a tune of our engine, or of another, finds."""
    from adaptspec_tuner.tune import tune as run_tune

    with without_loading_bars():
        return run_tune(
            *(model, draft_model, prompts, options), db=db, host=host, progress=progress
        )


def _with_defaults(host: Host, result: TuneResult) -> TuneResult:
    """With the parameters' defaults of every strategy and baseline, unless another
    engine was tuned, which has told its own."""
    if result.environment.engine != OURS:
        return result
    found: dict[str, Any] = {**host.strategies, **host.baselines}
    usual = {
        name: {spec.name: spec.default for spec in cls.Params.specs()}
        for name, cls in found.items()
    }
    return replace(result, defaults=usual)


def _show(results: Sequence[TuneResult], as_json: bool, several: bool = False) -> None:
    """One result, or one for each number of requests at a time, with a summary.

    Args:
        several: Whether several numbers were asked for: JSON is a list then.
    """
    from adaptspec_tuner.reporting import sentences
    from adaptspec_tuner.reporting.tables import print_by_concurrency, print_result

    if as_json:
        found = [sentences.as_json(result) for result in results]
        print_json(found if several else found[0])
        return
    for result in results:
        if result.worked is not None:
            click.echo(f"{result.worked} trials of run {result.run}", err=True)
        else:
            print_result(result, stdout_console())
    if len(results) > 1:
        print_by_concurrency(results, stdout_console())


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
    from adaptspec_tuner.reporting.stored import build

    store = host.open_store(db)
    try:
        found = _with_defaults(host, build(store, run))
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
    if as_json or output is None:
        _show([found], as_json)
