"""Durations and memory sizes as people type them: 90s, 1h30m, 6GiB."""

from __future__ import annotations

import re

from adaptspec.errors import AdaptSpecError

SECONDS = {"s": 1, "m": 60, "h": 3600, "": 60}


def duration(text: str) -> float | None:
    """Seconds of ``90s``, ``10m``, ``1.5h`` or a bare number of minutes, else None."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if found is None or float(found[1]) <= 0:
        return None
    return float(found[1]) * SECONDS[found[2]]


def parse_memory(text: str) -> int:
    """Bytes of ``6GiB``, ``800MiB``, ``6G`` or a bare number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)?\s*", text)
    size = (
        float(found[1]) * 2 ** (10 * "KMGT".find(found[2] or "-") + 10) if found else 0
    )
    if size < 1:
        raise AdaptSpecError(f"--max-memory must be a size such as 6GiB, got {text!r}")
    return int(size)
