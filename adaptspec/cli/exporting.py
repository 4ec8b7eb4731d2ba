"""``adaptspec export --for``: how an engine is started with what was found."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptspec.cli.output import print_json
from adaptspec.cli.texts import write
from adaptspec.errors import AdaptSpecError

if TYPE_CHECKING:
    from adaptspec.engines.exporting.export import Exported
    from adaptspec.host import Host

FLAGS, JSON, COMPOSE = "flags", "json", "compose"
FORMATS = (FLAGS, JSON, COMPOSE)


@dataclass(frozen=True)
class Shown:
    """How it is printed.

    Args:
        address: What the servers listen on.
        table: Where the router's table goes; None: nowhere.
        image: Of the engine; None: the one that its makers publish.
    """

    format: str
    address: str
    table: Path | None = None
    image: str | None = None


def show(engine: str, wanted: Any, shown: Shown, host: Host, db: str | None) -> None:
    """Print how ``engine`` is started, and write the router's table."""
    from adaptspec.engines.exporting.export import export_for

    with closing(host.open_store(db)) as store:
        exported = export_for(engine, wanted, host, store)
    if shown.format == COMPOSE:
        from adaptspec.engines.exporting.compose import compose_text

        text = compose_text(
            exported.plan, engine, shown.address, shown.image, exported.files
        )
        write(text)
    elif shown.format == JSON:
        from adaptspec.engines.exporting.texts import as_json

        table = {"table": _table(exported, shown.address)}
        print_json({**as_json(exported.plan, engine, shown.address), **table})
    else:
        from adaptspec.engines.exporting.texts import as_flags

        write(as_flags(exported.plan, engine, shown.address, background=wanted.split))
    if shown.table is not None:
        _write_table(exported, shown)


def mix_of(pairs: Sequence[str]) -> dict[str, float]:
    """Class -> weight of ``CLASS=WEIGHT``.

    Raises:
        AdaptSpecError: for anything else.
    """
    mix: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not name or not 0 <= weight < float("inf"):
            raise AdaptSpecError(
                f"--mix must be CLASS=WEIGHT with a weight of 0 or more, got {pair!r}"
            )
        mix[name] = weight
    return mix


def _table(exported: Exported, address: str) -> dict[str, Any]:
    from adaptspec.engines.exporting.plan import table_of

    return {**table_of(exported.plan, address), "classifier": exported.classifier}


def _write_table(exported: Exported, shown: Shown) -> None:
    """Write what the router reads."""
    from adaptspec.router.table import table_text

    assert shown.table is not None
    table = _table(exported, shown.address)
    shown.table.write_text(table_text(table, shown.table), encoding="utf-8")
    told = f"{shown.table}: the table for `adaptspec route {shown.table}`"
    if exported.classifier is None:
        told += "; no run learnt to tell classes, so requests must name theirs"
    click.echo(told, err=True)
