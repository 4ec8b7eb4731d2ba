"""``adaptspec profiles``: list, show, export, import, delete, migrate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

import click

from adaptspec.cli.output import print_json, stdout_console
from adaptspec.errors import ProfileStoreError

if TYPE_CHECKING:
    from adaptspec.profile import Profile, ProfileStore

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
@json_option
@db_option
def list_profiles(
    prompt_class: str | None, run: str | None, as_json: bool, db: str | None
) -> None:
    """List measured settings, newest first."""
    with _store(db) as store:
        found = store.profiles(prompt_class=prompt_class, run=run)
    if as_json:
        print_json(_documents(found))
        return
    if not found:
        click.echo("no profiles yet; `adaptspec tune` measures some", err=True)
        return
    from rich.table import Table

    table = Table(box=None)
    for column in (
        *("id", "run", "model", "draft, heads", "device", "class", "strategy"),
        *("parameters", "tokens/s", "x plain", "identical"),
    ):
        table.add_column(column)
    for p in found:
        m = p.measurement
        table.add_row(
            str(p.id),
            p.run,
            f"{p.environment.model_name} {p.environment.dtype}",
            ", ".join(
                filter(None, (p.environment.draft_name, p.environment.heads_name))
            )
            or "-",
            p.environment.device,
            p.prompt_class,
            p.strategy + _marks(p),
            " ".join(f"{k}={v}" for k, v in p.params.items()) or "-",
            f"{m.tokens_per_second:.1f}",
            f"{m.ratio:.2f}",
            f"{m.identical}/{m.prompts}",
        )
    stdout_console().print(table)


@profiles.command()
@click.argument("profile_id", type=int)
@json_option
@db_option
def show(profile_id: int, as_json: bool, db: str | None) -> None:
    """Show one setting with everything recorded about it."""
    with _store(db) as store:
        profile = store.profile(profile_id)
    if profile is None:
        raise ProfileStoreError(
            f"no profile {profile_id}; `adaptspec profiles list` shows their ids"
        )
    document = _documents([profile])[0]
    if as_json:
        print_json(document)
        return
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
            table = Table(
                "cached",
                *("1 token" if count == 1 else str(count) for count in of.rows),
                box=None,
                title=f"{name} {place.dtype}, {place.device_name}, {place.threads} "
                f"threads, {found.measured[:10]}: milliseconds of a forward",
                title_justify="left",
            )
            for context, line in zip(of.contexts, of.seconds, strict=True):
                table.add_row(str(context), *(f"{1e3 * each:.1f}" for each in line))
            stdout_console().print(table)


@profiles.command("export")
@click.option("--run", help="Only this tuning run.")
@click.option(
    "-o", "--output", type=click.File("w"), default="-", help="Default: stdout."
)
@db_option
def export_profiles(run: str | None, output: IO[str], db: str | None) -> None:
    """Write profiles as JSON that `import` reads."""
    from adaptspec_profiles.as_json import FORMAT

    with _store(db) as store:
        found = store.profiles(run=run)
    json.dump({"format": FORMAT, "profiles": _documents(found)}, output, indent=2)
    output.write("\n")


@profiles.command("import")
@click.argument("file", type=click.File("r"))
@db_option
def import_profiles(file: IO[str], db: str | None) -> None:
    """Add profiles that `export` wrote; importing twice adds nothing."""
    read = _read(file)
    with _store(db) as store:
        ids = store.add_profiles(read)
    click.echo(f"{len(set(ids))} profiles imported", err=True)


@profiles.command()
@click.argument("run")
@db_option
def delete(run: str, db: str | None) -> None:
    """Forget a tuning run: its profiles and trials."""
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


def _read(file: IO[str]) -> list[Profile]:
    """All of a file's profiles, or an error that names the first bad one."""
    from adaptspec_profiles.as_json import FORMAT, FORMAT_1, profile_from_json
    from adaptspec_profiles.renamed import renamed, without_gate

    try:
        document = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ProfileStoreError(f"{file.name} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") not in (
        FORMAT,
        FORMAT_1,
    ):
        raise ProfileStoreError(
            f"{file.name} must have been written by `adaptspec profiles export` "
            f"(format {FORMAT!r})"
        )
    records = document.get("profiles")
    if not isinstance(records, list) or len(document) > 2:
        keys = ", ".join(ascii(key) for key in document)
        raise ProfileStoreError(
            f"{file.name} must hold 'format' and a list 'profiles' and nothing else, "
            f"got {keys}{'' if isinstance(records, list) else ' without that list'}; "
            "export it again"
        )
    read = []
    for number, record in enumerate(records, 1):
        if isinstance(record, dict) and "params" in record:
            params = without_gate(None, record["params"])
            if document["format"] == FORMAT_1:
                params = renamed(record.get("strategy"), params)
            record = {**record, "params": params}
        try:
            read.append(profile_from_json(record))
        except ProfileStoreError as error:
            raise ProfileStoreError(
                f"{file.name}, profile {number}: {error}; nothing was imported"
            ) from None
    return read


def _marks(profile: Profile) -> str:
    return (" (baseline)" if profile.baseline else "") + (
        "" if profile.lossless else " (LOSSY)"
    )
