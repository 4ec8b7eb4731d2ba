"""``adaptspec route``: a proxy that sends each request to its class's server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptspec.errors import RoutingError

if TYPE_CHECKING:
    from adaptspec.router.table import RouteTable

MIB = 1 << 20


@click.command()
@click.argument("table", metavar="TABLE", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="To listen on.")
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="To listen on; 0: a free one.",
)
@click.option(
    "--max-requests",
    default=1024,
    show_default=True,
    type=click.IntRange(1),
    help="Requests that are answered at the same time; more are refused.",
)
@click.option(
    "--max-body",
    metavar="SIZE",
    default="64MiB",
    show_default=True,
    help="The longest request that is taken.",
)
@click.option(
    "--connect-timeout",
    metavar="SECONDS",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="For a connection to a server; answers may take as long as they take.",
)
@click.option(
    "--grace",
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    help="What is being answered may go on for so long after SIGTERM or Ctrl-C.",
)
def route(
    table: Path,
    host: str,
    port: int,
    max_requests: int,
    max_body: str,
    connect_timeout: float,
    grace: float,
) -> None:
    """Answer OpenAI's API by passing each request to the server of its class.

    TABLE is a JSON or YAML file, as `adaptspec export --for ENGINE --split --table
    TABLE` writes it. A prompt's class is told from its text, or named by the request's
    header x-adaptspec-class. Needs `pip install 'adaptspec[router]'`.
    """
    from adaptspec.cli.quantities import parse_memory
    from adaptspec.router.table import read_table

    read = read_table(table)
    most = parse_memory(max_body, "--max-body")
    try:
        from adaptspec.router.relay import Limits
        from adaptspec.router.serving import serve
    except ImportError as error:
        raise RoutingError(
            f"the router needs {error.name}: pip install 'adaptspec[router]'"
        ) from None
    logging.basicConfig(format="%(message)s", level=logging.WARNING)

    def ready(url: str) -> None:
        click.echo(f"{url}: {described(read)}", err=True)

    serve(
        read,
        host,
        port,
        Limits(most, max_requests),
        connect_timeout=connect_timeout,
        grace=grace,
        ready=ready,
    )


def described(table: RouteTable) -> str:
    """Which server answers what, in a line."""
    parts = [f"{name} -> {server}" for name, server in table.classes.items()]
    parts.append(f"everything else -> {table.default}")
    told = ", ".join(parts)
    if table.teller is None and table.classes:
        told += (
            "; the table has no classifier, so only requests that name their class in "
            "x-adaptspec-class have one"
        )
    return told
