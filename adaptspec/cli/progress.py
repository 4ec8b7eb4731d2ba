"""Progress with time left, on stderr: a live line on a terminal, else plain lines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import isfinite
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_EVERY = 10.0  # seconds between plain lines


class Progress(AbstractContextManager["Progress"]):
    """Says what is being done; without a console, nothing.

    Args:
        clock: Tells when the next plain line is due.
    """

    def __init__(self, console: Console | None, clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._next = float("-inf")
        self._status = (
            console.status("") if console is not None and console.is_terminal else None
        )

    def __enter__(self) -> Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def doing(self, what: str, seconds_left: float) -> None:
        """What is being done now."""
        left = f" ({minutes(seconds_left)} left)" if isfinite(seconds_left) else ""
        line = what + left
        if self._status is not None:
            from rich.text import Text

            # A string would be read as markup, and class names are the user's.
            self._status.update(Text(line), spinner_style="cyan")
        elif self._console is not None and self._clock() >= self._next:
            self._next = self._clock() + PLAIN_EVERY
            self.say(line)

    def say(self, text: str) -> None:
        """Something worth keeping on screen."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def minutes(seconds: float) -> str:
    """``3:05``; never negative."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"
