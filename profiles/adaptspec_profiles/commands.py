"""``adaptspec profiles``: what was measured and decided, shown, moved and deleted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

import click

from adaptspec.cli.output import print_json, stdout_console
from adaptspec.errors import ProfileStoreError
from adaptspec.profile import OURS
from adaptspec.run_records import DEFAULTS

if TYPE_CHECKING:
    from rich.table import Table

    from adaptspec.host import Host
    from adaptspec.profile import ClassChoice, Environment, Profile, ProfileStore

RUN_LENGTH = 16  # of a run's name, which may be digits alone

db_option = click.option(
    "--db", metavar="URL", help="Profile database: a path or SQLAlchemy URL."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def profiles() -> None:
    """Show, move and delete what tuning measured."""


@profiles.command("list")
@click.option("--class", "prompt_class", help="Only this class.")
@click.option("--run", help="Only this tuning run.")
@click.option("--runs", is_flag=True, help="List runs, and what is used of each.")
@json_option
@db_option
@click.pass_obj
def list_profiles(
    host: Host | None,
    /,
    prompt_class: str | None,
    run: str | None,
    runs: bool,
    as_json: bool,
    db: str | None,
) -> None:
    """List measured settings, newest first."""
    if runs:
        _list_runs(prompt_class, run, as_json, db)
        return
    with _store(db) as store:
        found = store.profiles(prompt_class=prompt_class, run=run)
        told = {name: store.record(name, DEFAULTS) for name in {p.run for p in found}}
    if as_json:
        print_json(_documents(found))
        return
    if not found:
        click.echo("no profiles yet; `adaptspec tune` measures some", err=True)
        return
    engines = _several_engines(p.environment for p in found)
    defaults = {} if host is None else _defaults(host)
    by_run: dict[tuple[object, ...], list[Profile]] = {}
    for p in found:
        by_run.setdefault((p.run, *p.environment.key()), []).append(p)
    for ours in by_run.values():
        name, place = ours[0].run, ours[0].environment
        of = [f"{place.model_name} {place.dtype}", place.device]
        of += [place.decoded_by] if engines else []
        of += [
            f"with {other}" for other in (place.draft_name, place.heads_name) if other
        ]
        click.echo(f"run {name}: {', '.join(of)}")
        usual = defaults if place.engine == OURS else told[name] or {}
        stdout_console().print(_settings(ours, usual))


def _defaults(host: Host) -> dict[str, dict[str, Any]]:
    """The parameters' defaults of every strategy and baseline that is installed."""
    found: dict[str, Any] = {**host.strategies, **host.baselines}
    return {
        name: {spec.name: spec.default for spec in cls.Params.specs()}
        for name, cls in found.items()
    }


def _settings(
    found: Sequence[Profile], defaults: Mapping[str, Mapping[str, Any]]
) -> Table:
    """What a run measured, one row a setting; its figures and its id stay whole.

    Args:
        defaults: Strategy -> its parameters' defaults, which aren't shown.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    for column in ("id", "x plain", "tokens/s", "identical"):
        table.add_column(column, no_wrap=True, justify="right")
    for column in ("class", "strategy", "not default"):
        table.add_column(column, overflow="fold")
    for p in found:
        m = p.measurement
        usual = defaults.get(p.strategy, {})
        params = {k: v for k, v in p.params.items() if k not in usual or usual[k] != v}
        table.add_row(
            str(p.id),
            f"{m.ratio:.2f}",
            f"{m.tokens_per_second:.1f}",
            f"{m.identical}/{m.prompts}",
            Text(p.prompt_class),
            p.strategy + _marks(p),
            Text(" ".join(f"{k}={v}" for k, v in params.items()) or "-"),
        )
    return table


def _list_runs(
    prompt_class: str | None, run: str | None, as_json: bool, db: str | None
) -> None:
    from adaptspec.profile import EVERY_CLASS

    with _store(db) as store:
        choices = store.choices()
    used = {(c.run, c.prompt_class) for c in in_use(choices)}
    found = [
        choice
        for choice in choices
        if run in (None, choice.run) and prompt_class in (None, choice.prompt_class)
    ]
    runs = list(dict.fromkeys(choice.run for choice in found))
    if as_json:
        print_json([_run_as_json(choices, name, used) for name in runs])
        return
    if not found:
        click.echo("no runs yet; `adaptspec tune` makes one", err=True)
        return
    from rich.table import Table

    table = Table(box=None)
    engines = _several_engines(choice.environment for choice in found)
    columns = (
        "run",
        *engines,
        "model",
        "device",
        "decided",
        "prompts",
        "classes",
        "used for",
    )
    for column in columns:
        table.add_column(column, no_wrap=column == "run", overflow="fold")
    for name in runs:
        ours = [choice for choice in choices if choice.run == name]
        named = [c for c in ours if c.prompt_class != EVERY_CLASS]
        serving = [_class(c) for c in ours if (name, c.prompt_class) in used]
        place = ours[0].environment
        table.add_row(
            name + (" (pinned)" if ours[0].pinned else ""),
            *(place.decoded_by for _ in engines),
            f"{place.model_name} {place.dtype}",
            place.device,
            f"{max(c.created for c in ours):%Y-%m-%d %H:%M}",
            str(sum(choice.prompts for choice in named)),
            ", ".join(sorted(c.prompt_class for c in named)),
            ", ".join(sorted(serving)) or "-",
        )
    stdout_console().print(table)


def _several_engines(places: Iterable[Environment]) -> list[str]:
    """The heading of a column that tells engines, where others than ours decoded."""
    return ["engine"] if any(place.engine != OURS for place in places) else []


def in_use(choices: Sequence[ClassChoice]) -> list[ClassChoice]:
    """Those that are used where they were decided, without naming a run."""
    from adaptspec.selector import rank

    places: dict[tuple[object, ...], list[ClassChoice]] = {}
    for choice in choices:
        places.setdefault(choice.environment.key(), []).append(choice)
    found = []
    for here in places.values():
        newest = {c.prompt_class: c for c in sorted(here, key=lambda c: c.created)}
        for name, choice in newest.items():
            decided = rank(here, choice.environment, name).decided
            assert decided is not None  # the newest is one
            found.append(decided)
    return found


def _run_as_json(
    choices: Sequence[ClassChoice], run: str, used: set[tuple[str, str]]
) -> dict[str, Any]:
    from adaptspec_profiles.as_json import json_value

    ours = [choice for choice in choices if choice.run == run]
    return {
        "run": run,
        "pinned": ours[0].pinned,
        "environment": json_value(ours[0].environment),
        "choices": [
            {
                **{k: v for k, v in json_value(choice).items() if k != "environment"},
                "used": (run, choice.prompt_class) in used,
            }
            for choice in ours
        ],
    }


def _class(choice: ClassChoice) -> str:
    """A choice's class for people."""
    from adaptspec.profile import EVERY_CLASS

    name = choice.prompt_class
    return "all classes" if name == EVERY_CLASS else name


def _choice_in_words(choice: ClassChoice) -> str:
    if not choice.picks:
        return f"plain decoding, {choice.reason}"
    pick = choice.picks[0]
    return f"{pick.strategy}, {pick.reason}"


@profiles.command()
@click.argument("profile_id", metavar="ID|RUN")
@json_option
@db_option
def show(profile_id: str, as_json: bool, db: str | None) -> None:
    """Show one setting by its id, or what a tuning run decided."""
    if not profile_id.isdecimal() or len(profile_id) == RUN_LENGTH:
        _show_run(profile_id, as_json, db)
        return
    from adaptspec.in_use import describe
    from adaptspec_profiles.as_json import use_to_json

    with _store(db) as store:
        profile = store.profile(int(profile_id))
        uses = [use for use in store.uses() if use.profile == int(profile_id)]
    if profile is None:
        raise ProfileStoreError(
            f"no profile {profile_id}; `adaptspec profiles list` shows their ids"
        )
    document = _documents([profile])[0]
    if as_json:
        print_json({**document, "in_use": [use_to_json(use) for use in uses]})
        return
    # By the class that was chosen for; one profile may serve several.
    document["in_use"] = {use.prompt_class: describe(profile, use) for use in uses}
    for key, value in document.items():
        if isinstance(value, dict):
            click.echo(f"{key}:")
            for name, item in value.items():
                click.echo(f"  {name}: {item}")
        else:
            click.echo(f"{key}: {value}")


@profiles.command()
@json_option
@db_option
def costs(as_json: bool, db: str | None) -> None:
    """List what forwards cost, as measured for each model and machine."""
    from adaptspec.model.hardware_costs import stored_costs

    with _store(db) as store:
        places = {p.environment.key(): p.environment for p in store.profiles()}
        known = [
            (place, found)
            for place in places.values()
            if (found := stored_costs(store, place)) is not None
        ]
    if as_json:
        print_json(
            [
                {"environment": asdict(place), **found.as_json()}
                for place, found in known
            ]
        )
        return
    if not known:
        click.echo("no costs yet; `adaptspec tune` measures them", err=True)
        return
    from rich.table import Table

    for place, found in known:
        for name, of in ((place.model_name, found.target), ("draft", found.draft)):
            if of is None:
                continue
            threads = f"{place.threads} thread{'' if place.threads == 1 else 's'}"
            click.echo(
                f"{name} {place.dtype}, {place.device_name}, {threads}, "
                f"{found.measured[:10]}: milliseconds of a forward"
            )
            table = Table(
                "tokens",
                *(f"behind {context}" for context in of.contexts),
                box=None,
            )
            for count, *line in zip(of.rows, *of.seconds, strict=True):
                table.add_row(str(count), *(f"{1e3 * each:.1f}" for each in line))
            stdout_console().print(table)


def _show_run(run: str, as_json: bool, db: str | None) -> None:
    with _store(db) as store:
        choices = store.choices()
    ours = _of_run(choices, run)
    used = {(c.run, c.prompt_class) for c in in_use(choices)}
    if as_json:
        print_json(_run_as_json(choices, run, used))
        return
    engine = "".join(
        f", {ours[0].environment.decoded_by}"
        for _ in _several_engines([ours[0].environment])
    )
    click.echo(f"run {run}{engine}{', pinned' if ours[0].pinned else ''}")
    for choice in ours:
        serves = "" if (run, choice.prompt_class) in used else " (not used)"
        click.echo(f"{_class(choice)}{serves}: {_choice_in_words(choice)}")


def _of_run(choices: Sequence[ClassChoice], run: str) -> list[ClassChoice]:
    """A run's choices by class.

    Raises:
        ProfileStoreError: if it has none.
    """
    ours = [choice for choice in choices if choice.run == run]
    if not ours:
        raise ProfileStoreError(
            f"no run {run!r}; `adaptspec profiles list --runs` shows them"
        )
    return sorted(ours, key=lambda choice: choice.prompt_class)


@profiles.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@json_option
@db_option
def compare(runs: Sequence[str], as_json: bool, db: str | None) -> None:
    """Set what tuning runs decided side by side, class by class."""
    with _store(db) as store:
        choices = store.choices()
    by_run = {run: _of_run(choices, run) for run in runs}
    used = {(c.run, c.prompt_class) for c in in_use(choices)}
    if as_json:
        print_json([_run_as_json(choices, run, used) for run in runs])
        return
    from rich.table import Table

    table = Table(box=None)
    for column in ("class", "run", "choice", "x plain", "95% interval", "prompts", ""):
        table.add_column(column, no_wrap=column == "run", overflow="fold")
    for name in sorted({c.prompt_class for ours in by_run.values() for c in ours}):
        for run, ours in by_run.items():
            for choice in [c for c in ours if c.prompt_class == name]:
                pick = choice.picks[0] if choice.picks else None
                table.add_row(
                    _class(choice),
                    run,
                    "plain decoding" if pick is None else pick.strategy,
                    "1.00" if pick is None else f"{pick.ratio:.2f}",
                    "-" if pick is None else f"{pick.low:.2f} to {pick.high:.2f}",
                    str(choice.prompts),
                    "used" if (run, name) in used else "",
                )
    stdout_console().print(table)


@profiles.command()
@click.argument("run")
@db_option
def pin(run: str, db: str | None) -> None:
    """Use a run's choices before all others of its model and engine."""
    with _store(db) as store:
        choices = store.choices()
        place = _of_run(choices, run)[0].environment
        ours = (place.model, place.engine)
        same = {
            c.run
            for c in choices
            if (c.environment.model, c.environment.engine) == ours
        }
        for other in same - {run}:
            store.pin(other, False)
        store.pin(run, True)
    click.echo(f"run {run} is pinned", err=True)


@profiles.command()
@click.argument("run")
@db_option
def unpin(run: str, db: str | None) -> None:
    """Let the best evidence count again."""
    with _store(db) as store:
        _of_run(store.choices(), run)
        store.pin(run, False)
    click.echo(f"run {run} isn't pinned", err=True)


@profiles.command()
@click.option("--dry-run", is_flag=True, help="Only say which.")
@db_option
def prune(dry_run: bool, db: str | None) -> None:
    """Forget tuning runs that nothing is used of any more."""
    with _store(db) as store:
        choices = store.choices()
        used = {choice.run for choice in in_use(choices)}
        gone = sorted({choice.run for choice in choices} - used)
        for run in gone:
            if not dry_run:
                store.delete_run(run)
            click.echo(run)
    said = "would be forgotten" if dry_run else "forgotten"
    click.echo(f"{len(gone)} run{'' if len(gone) == 1 else 's'} {said}", err=True)


@profiles.command("export")
@click.option("--run", help="Only this tuning run.")
@click.option(
    "-o", "--output", type=click.File("w"), default="-", help="Default: stdout."
)
@db_option
def export_profiles(run: str | None, output: IO[str], db: str | None) -> None:
    """Write all that a choice needs as JSON that `import` reads."""
    from adaptspec_profiles.exchange import exported

    with _store(db) as store:
        document = exported(store, run)
    json.dump(document, output, indent=2)
    output.write("\n")


@profiles.command("import")
@click.argument("file", type=click.File("r"))
@db_option
def import_profiles(file: IO[str], db: str | None) -> None:
    """Add what `export` wrote; what is here and newer stays."""
    from adaptspec_profiles.exchange import read, take_over

    found = read(file)
    with _store(db) as store:
        count = take_over(store, found)
    click.echo(f"{count} profiles imported", err=True)


@profiles.command()
@click.argument("run")
@db_option
def delete(run: str, db: str | None) -> None:
    """Forget a tuning run: profiles, choices, trials and records."""
    with _store(db) as store:
        count = store.delete_run(run)
    click.echo(f"{count} profiles deleted", err=True)


@profiles.command()
@db_option
def migrate(db: str | None) -> None:
    """Bring the database to this version's tables (opening it does so too)."""
    with _store(db) as store:
        click.echo(f"{store.url} is up to date", err=True)


@profiles.command()
@click.option(
    "--host",
    "address",
    default="localhost",
    show_default=True,
    help="Address to listen at.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=13000,
    show_default=True,
    help="Port to listen at; 0: any free one.",
)
@db_option
def serve(address: str, port: int, db: str | None) -> None:
    """Let `tune --worker` in through Optuna's gRPC proxy; ends with Ctrl-C.

    Whoever reaches the port may read and write the studies; nothing is encrypted.
    """
    from adaptspec_profiles.sql import SqlStore
    from adaptspec_profiles.studies import serve_studies

    with _store(db) as store:
        if not isinstance(store, SqlStore):
            raise ProfileStoreError(f"{store.url} keeps no studies; give --db a file")
        serve_studies(
            store.studies(),
            address,
            port,
            lambda port: click.echo(f"serving {store.url} at grpc://{address}:{port}"),
        )


@contextmanager
def _store(db: str | None) -> Iterator[ProfileStore]:
    from adaptspec_profiles import open_store

    store = open_store(db)
    try:
        yield store
    finally:
        store.close()


def _documents(found: Sequence[Profile]) -> list[dict[str, Any]]:
    from adaptspec_profiles.as_json import profile_to_json

    return [profile_to_json(profile) for profile in found]


def _marks(profile: Profile) -> str:
    return (" (baseline)" if profile.baseline else "") + (
        "" if profile.lossless else " (LOSSY)"
    )
