"""Progress with time left, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import inf, isfinite
from types import TracebackType
from typing import TYPE_CHECKING, Any

from adaptspec.cli.quantities import clock_time

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar


class Progress(AbstractContextManager["Progress"]):
    """Says what is being done; without a console, nothing.

    It may be entered again while it is shown: the outermost block ends it.

    Args:
        clock: Tells how much time is left between two calls of :meth:`doing`.
        plain_every: Seconds to each line where there is no terminal.
    """

    def __init__(
        self,
        console: Console | None,
        clock: Callable[[], float],
        plain_every: float = 30.0,
    ) -> None:
        self._console, self._clock, self._plain_every = console, clock, plain_every
        self._entered = 0
        self._began: float | None = None
        self._next_line = inf
        self._bar: Bar | None = None
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            self._bar = _bar(console, self._share_done, self._time_left)
            self._task = self._bar.add_task("", total=1.0)
        self._deadline = inf

    def __enter__(self) -> Progress:
        if self._bar is not None and self._entered == 0:
            self._bar.start()
        self._entered += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered -= 1
        if self._bar is not None and self._entered == 0:
            self._bar.stop()

    def doing(self, what: str, seconds_left: float) -> None:
        """What is being done now, and when all of it will be done."""
        now = self._clock()
        if self._began is None:
            self._began, self._next_line = now, now + self._plain_every
        self._deadline = now + seconds_left
        if self._bar is not None:
            self._bar.update(self._task, description=what)
        elif self._console is not None and now >= self._next_line:
            self._next_line = now + self._plain_every
            left = self._time_left()
            self.say(f"{what} ({left})" if left else what)

    def say(self, text: str) -> None:
        """Something worth keeping on screen."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _share_done(self) -> float | None:
        """Of the time; None where no end is known."""
        if self._began is None or not isfinite(self._deadline):
            return None
        whole = max(self._deadline - self._began, 1e-9)
        return min(1.0, (self._clock() - self._began) / whole)

    def _time_left(self) -> str:
        """``3:05 left``; empty where no end is known."""
        if not isfinite(self._deadline):
            return ""
        return f"{clock_time(self._deadline - self._clock())} left"


def _bar(
    console: Console, share: Callable[[], float | None], left: Callable[[], str]
) -> Bar:
    """A live line that moves by itself: what is done, a bar, the time left."""
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn, SpinnerColumn, TextColumn
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    class Share(ProgressColumn):
        def render(self, task: Any) -> ProgressBar:
            done = share()
            return ProgressBar(
                total=1.0,
                completed=done or 0.0,
                width=max(8, min(30, console.width // 4)),
                pulse=done is None,
                finished_style="bar.complete",
                animation_time=task.get_time(),
            )

    class Left(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(left())

    return Bar(
        SpinnerColumn(style="cyan"),
        Share(),
        Left(),
        # A string would be read as markup, and class names are the user's.
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
    )
