"""Results go to stdout, progress and warnings to stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

PIPE_WIDTH = 200

if TYPE_CHECKING:
    from rich.console import Console


def stdout_console() -> Console:
    """Where results go; a pipe gets whole lines, however narrow the terminal."""
    import sys

    from rich.console import Console

    # Class names and prompts are the user's: no bracket of theirs is markup.
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, markup=False)


def stderr_console() -> Console:
    """Where progress and warnings go."""
    from rich.console import Console

    return Console(stderr=True, markup=False)


def print_json(value: Any) -> None:
    """Print ``value`` as indented JSON on stdout."""
    from adaptspec.cli.texts import write

    write(json.dumps(value, indent=2, default=str) + "\n")


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Inside, transformers shows no bar for loading weights; a download's bar stays."""
    import huggingface_hub.utils
    import transformers.utils

    logging: Any = transformers.utils.logging
    hub: Any = huggingface_hub.utils
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # the hub's, too
    hub.enable_progress_bars()
    try:
        yield
    finally:
        logging.enable_progress_bar()
