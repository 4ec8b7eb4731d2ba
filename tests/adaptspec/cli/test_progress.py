"""Progress says what is done and how much time is left."""

from __future__ import annotations

import io
import math
import re

from rich.console import Console

from adaptspec.cli.progress import Progress
from adaptspec.testing.fakes import FakeClock


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    shown = Console(
        file=out,
        force_terminal=terminal,
        color_system="standard",
        width=80,
        markup=False,
        _environ={},
    )
    return shown, out


def test_without_a_terminal_lines_come_rarely_and_what_is_short_says_nothing() -> None:
    shown, out = console(terminal=False)
    clock = FakeClock()
    with Progress(shown, clock, plain_every=30.0) as progress:
        for second in range(65):
            progress.doing(f"step {second}", 100 - clock.now)
            clock.advance(1)
        progress.say("worth keeping")
    assert out.getvalue().splitlines() == [
        "step 30 (1:10 left)",
        "step 60 (0:40 left)",
        "worth keeping",
    ]


def test_on_a_terminal_a_bar_moves_with_the_clock_alone() -> None:
    shown, out = console(terminal=True)
    clock = FakeClock()
    with Progress(shown, clock) as progress:
        progress.doing("loading [bold]", 100)
        progress._bar.refresh()  # type: ignore[union-attr]
        first = out.getvalue()
        clock.advance(75)
        progress._bar.refresh()  # type: ignore[union-attr]
        later = out.getvalue()[len(first) :]
    assert "1:40 left" in first
    assert "loading [bold]" in first  # not read as markup
    assert "0:25 left" in later

    def filled(text: str) -> int:
        """Cells of the last bar in the colour of what is done."""
        return sum(map(len, re.findall(r"\x1b\[91m(━+)", text.split("\x1b[2K")[-1])))

    assert filled(first) == 0
    assert 0.7 < filled(later) / 20 < 0.8


def test_time_that_has_no_end_is_not_told() -> None:
    shown, out = console(terminal=False)
    progress = Progress(shown, FakeClock(), plain_every=0.0)
    progress.doing("answering", math.inf)
    assert out.getvalue() == "answering\n"


def test_the_outermost_block_ends_it() -> None:
    shown, _ = console(terminal=True)
    progress = Progress(shown, FakeClock())
    bar = progress._bar
    assert bar is not None
    with progress:
        with progress:
            pass
        assert bar.live.is_started
    assert not bar.live.is_started


def test_without_a_console_nothing_is_said() -> None:
    with Progress(None, FakeClock()) as progress:
        progress.doing("loading", 3.0)
        progress.say("x")
