"""Durations and memory sizes as people type and read them: 1h30m, 3:05, 6GiB."""

from __future__ import annotations

import math
import re

from adaptspec.errors import AdaptSpecError

# The beginnings of units, as in "min" and "minutes"; longest first.
_UNITS = (
    (3600, r"h(?:(?:ou)?rs?)?"),
    (60, r"m(?:in(?:ute)?s?)?"),
    (1, r"s(?:ec(?:ond)?s?)?"),
)
_NUMBER = r"\d+(?:\.\d+)?"


def duration(text: str) -> float | None:
    """Seconds of ``90s``, ``10m``, ``1.5h``, ``1h30m`` or ``600``; None for another.

    A bare number is seconds. Each unit stands once, the longer ones first.
    """
    text = text.strip().lower()
    if re.fullmatch(_NUMBER, text):
        seconds = float(text)
    else:
        parts = [rf"(?:({_NUMBER})\s*{unit}\s*)?" for _, unit in _UNITS]
        found = re.fullmatch("".join(parts), text)
        if found is None:
            return None
        seconds = sum(
            float(number) * size
            for number, (size, _) in zip(found.groups(), _UNITS, strict=True)
            if number is not None
        )
    return seconds if 0 < seconds < math.inf else None


def clock_time(seconds: float) -> str:
    """``3:05``, or ``1:03:05`` from an hour on; never negative."""
    whole = max(0, round(seconds))
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def parse_memory(text: str, option: str = "--max-memory") -> int:
    """Bytes of ``6GiB``, ``800MiB``, ``6G`` or a bare number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)?\s*", text)
    size = (
        float(found[1]) * 2 ** (10 * "KMGT".find(found[2] or "-") + 10) if found else 0
    )
    if size < 1:
        raise AdaptSpecError(f"{option} must be a size such as 6GiB, got {text!r}")
    return int(size)
