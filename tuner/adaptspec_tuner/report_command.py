"""``adaptspec report``: a tuning run as a table, JSON or one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptspec.cli.output import print_json, stdout_console
from adaptspec.errors import AdaptSpecError

if TYPE_CHECKING:
    from adaptspec.host import Host


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
    from adaptspec_tuner.report_data import build

    store = host.open_store(db)
    try:
        found = build(store, run)
    finally:
        store.close()
    if output is not None:
        from adaptspec_tuner.report_html import render

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
        from adaptspec_tuner.report_text import print_report

        print_report(found, stdout_console())
