"""``adaptspec compare``: the same prompts on every engine at hand, in one table."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptspec.cli.output import (
    print_json,
    stderr_console,
    stdout_console,
    without_loading_bars,
)
from adaptspec.errors import AdaptSpecError
from adaptspec.profile import PLAIN

if TYPE_CHECKING:
    from rich.console import Console

    from adaptspec.engines.inference_engine import EngineOptions
    from adaptspec.host import Host
    from adaptspec.profile import Environment
    from adaptspec_tuner.engines.comparison import Comparison


def by_engine(
    given: Sequence[str], engines: Sequence[str], flag: str
) -> tuple[str | None, dict[str, str]]:
    """What holds for all engines, and what for one: ``VALUE`` and ``ENGINE=VALUE``.

    Raises:
        AdaptSpecError: if there are two for the same.
    """
    common: str | None = None
    own: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if equals and name in engines:
            if name in own:
                raise AdaptSpecError(f"one {flag} {name}=... is enough, got {text!r}")
            own[name] = value
        elif common is not None:
            raise AdaptSpecError(
                f"one {flag} serves all engines, got {common!r} and {text!r}; for one "
                f"engine write {flag} ENGINE=VALUE; engines: {', '.join(engines)}"
            )
        else:
            common = text
    return common, own


def lists_by_engine(
    given: Sequence[str], engines: Sequence[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """The same of an option that may be given several times for each engine."""
    common: list[str] = []
    own: dict[str, list[str]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if equals and name in engines:
            own.setdefault(name, []).append(value)
        else:
            common.append(text)
    return common, own


def _tokens(text: str | None) -> int | None:
    """An engine's ``--context``.

    Raises:
        AdaptSpecError: for anything but a whole number from 1.
    """
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise AdaptSpecError(f"--context must be a whole number from 1, got {text!r}")
    return int(text)


@click.command()
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    metavar="[ENGINE=]MODEL",
    help="Model of all engines that are started here, or of the servers where URLs "
    "alone are asked; ENGINE=MODEL of one, as llama.cpp=m.gguf.",
)
@click.option(
    "--draft-model",
    "drafts",
    multiple=True,
    metavar="[ENGINE=]MODEL",
    help="The same of a draft model.",
)
@click.option(
    "--heads",
    multiple=True,
    metavar="[ENGINE=]DIR",
    help="Heads trained for the model; may be repeated.",
)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="NAME|URL",
    help="Only these; default: all that are at hand.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="Measure also this method with its defaults, where an engine has it.",
)
@click.option(
    "--workload",
    type=Path,
    help="JSON lines or a JSON array; - is standard input. Default: the examples.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Most prompts per class.",
)
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Most new tokens where a prompt doesn't say.",
)
@click.option(
    "--engine-command",
    "commands",
    multiple=True,
    metavar="ENGINE=PROGRAM",
    help="An engine's program.",
)
@click.option(
    "--engine-python",
    "pythons",
    multiple=True,
    metavar="ENGINE=PROGRAM",
    help="Python that an engine is installed for.",
)
@click.option(
    "--engine-argument",
    "arguments",
    multiple=True,
    metavar="ENGINE=TEXT",
    help="One more argument of an engine's program; may be repeated.",
)
@click.option(
    "--context",
    "contexts",
    multiple=True,
    metavar="ENGINE=N",
    help="An engine's tokens of the longest prompt with its answer.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Requests at a time.",
)
@click.option("--dtype", default="auto", show_default=True, help="As tune's.")
@click.option("--device", help="As tune's.")
@click.option("--threads", type=click.IntRange(min=1), help="Of each engine.")
@click.option("--api-key", help="For servers that want one.")
@click.option("--db", help="Profile database: path or SQLAlchemy URL.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def compare(
    host: Host,
    models: Sequence[str],
    drafts: Sequence[str],
    heads: Sequence[str],
    engines: Sequence[str],
    methods: Sequence[str],
    workload: Path | None,
    limit: int,
    max_new_tokens: int,
    commands: Sequence[str],
    pythons: Sequence[str],
    arguments: Sequence[str],
    contexts: Sequence[str],
    concurrency: int,
    dtype: str,
    device: str | None,
    threads: int | None,
    api_key: str | None,
    db: str | None,
    as_json: bool,
) -> None:
    """Answer the same prompts with every engine at hand, in turns.

    Each decodes plainly, and with what its own tune chose, where it was tuned.
    """
    from adaptspec.cli.progress import Progress
    from adaptspec.engines.inference_engine import EngineOptions
    from adaptspec_tuner.engines.compare import compare as run
    from adaptspec_tuner.engines.tune import SERVER, engine_class
    from adaptspec_tuner.options import asked_prompts

    prompts = asked_prompts(workload, skip_bad=False)
    kept = [p for of in prompts.by_class().values() for p in of[:limit]]
    names = list(dict.fromkeys(engines)) or [
        name for name in host.engines if name != SERVER
    ]
    for name in names:
        engine_class(host, name)  # raises, naming the known ones
    # What is said of engines that --engine leaves out stays in the command unused.
    known = list(dict.fromkeys([*names, *host.engines]))
    model, own_models = by_engine(models, known, "--model")
    draft, own_drafts = by_engine(drafts, known, "--draft-model")
    command, own_commands = by_engine(commands, known, "--engine-command")
    python, own_pythons = by_engine(pythons, known, "--engine-python")
    common_heads, own_heads = lists_by_engine(heads, known)
    words, own_words = lists_by_engine(arguments, known)
    context, own_contexts = by_engine(contexts, known, "--context")
    for flag, value in (
        ("--engine-command", command),
        ("--engine-python", python),
        ("--engine-argument", next(iter(words), None)),
        ("--context", context),
    ):
        if value is not None:
            raise AdaptSpecError(
                f"{flag} is one engine's: write {flag} ENGINE={value}; engines: "
                f"{', '.join(names)}"
            )
    urls = [name for name in names if "://" in name]
    # What is said of no engine is of those that are started here, if there are any.
    shared = [name for name in names if name not in urls] or urls
    asked: list[EngineOptions] = [
        EngineOptions(
            engine=name,
            model=own_models.get(name, model if name in shared else None),
            draft_model=own_drafts.get(name, draft if name in shared else None),
            heads=tuple(own_heads.get(name, common_heads if name in shared else [])),
            command=own_commands.get(name),
            python=own_pythons.get(name),
            arguments=tuple(own_words.get(name, ())),
            context=_tokens(own_contexts.get(name)),
            concurrency=concurrency,
            dtype=dtype,
            device=device,
            threads=threads,
            # Engines that are started here want none.
            api_key=api_key if name in urls or not urls else None,
        )
        for name in names
    ]
    with (
        Progress(stderr_console(), time.monotonic) as progress,
        without_loading_bars(),
        contextlib.closing(host.open_store(db)) as store,
    ):
        found = run(
            asked,
            replace(prompts, prompts=tuple(kept)),
            store,
            host,
            methods=methods,
            max_new_tokens=max_new_tokens,
            doing=lambda text: progress.doing(text, float("inf")),
            warn=progress.say,
        )
    if as_json:
        print_json(found.as_json())
    elif found.rows:
        print_comparison(found, stdout_console())
    if not found.rows:
        reasons = [f"{name}: {why}" for name, why in found.left_out.items()]
        if len(reasons) == len(names):
            raise AdaptSpecError(f"no engine answered; {'; '.join(reasons)}")
        raise AdaptSpecError(
            "no prompt was answered by all engines; name fewer with --engine, or give "
            f"shorter prompts; {'; '.join([*reasons, *found.notes])}"
        )


def print_comparison(found: Comparison, console: Console) -> None:
    """Print a row for each engine and way of decoding, a column for each class."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    classes = list(dict.fromkeys(name for row in found.rows for name in row.cells))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("engine, decoding", overflow="fold")
    for name in classes:
        table.add_column(Text(name), justify="right")
    table.add_column("x first row", justify="right")
    table.add_column("ms to first", justify="right")
    base = found.rows[0]
    for row in found.rows:
        ratio = row.ratio(base)
        # Classes differ: some of them tell nothing of all.
        part = len(row.cells) < len(classes)
        firsts = [cell.seconds_to_first for cell in row.cells.values()]
        cells = [
            f"{row.cells[name].tokens_per_second:.1f}" if name in row.cells else "-"
            for name in classes
        ]
        table.add_row(
            Text(row.label),
            *cells,
            "-" if ratio is None else f"{ratio:.2f}",
            "-" if part else f"{1e3 * sum(firsts) / len(firsts):.0f}",
        )
    console.print(
        "Tokens per second after the first, median over prompts; x first row: time "
        "per token of whole answers, geometric mean over classes.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for name, environment in found.engines.items():
        say(f"{name}: {described(environment)}")
    for row in found.rows:
        used = {
            f"{cell.setting} {dict(cell.params)}" if cell.params else cell.setting
            for cell in row.cells.values()
            if cell.setting != PLAIN
        }
        if used:
            say(f"{row.label}: {'; '.join(sorted(used))}")
    for note in found.notes:
        say(note)
    for name, reason in found.left_out.items():
        say(f"left out: {name}: {reason}")


def described(environment: Environment) -> str:
    """What an engine was measured with, in a line."""
    told = {
        "version": environment.versions.get(environment.engine),
        "model": environment.model_name,
        "dtype": environment.dtype,
        "draft model": environment.draft_name,
        "heads": environment.heads_name,
        "threads": environment.threads,
        "requests at a time": environment.concurrency,
    }
    return ", ".join(f"{name} {value}" for name, value in told.items() if value)
