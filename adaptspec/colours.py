"""Colours for charts, as many as needed, that colour-blind people tell apart, too.

Each is as far as can be from all before it, to the normal eye and to eyes without the
red or the green cones (Machado, Oliveira and Fernandes 2009, severity 1), in OKLab
(Ottosson 2020). Against the background it keeps the contrast that WCAG 2 asks of
graphics, 3:1.
"""

from __future__ import annotations

import functools
import itertools
import math

Triple = tuple[float, float, float]
Matrix = tuple[Triple, Triple, Triple]

# Linear sRGB as seen without the red, and without the green, cones.
COLOUR_BLIND: dict[str, Matrix] = {
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}
TO_CONES: Matrix = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
TO_LAB: Matrix = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


@functools.cache
def distinct_colours(
    count: int,
    background: str,
    least_contrast: float = 3.0,
    most_contrast: float = 9.0,
    steps: int = 8,
) -> tuple[str, ...]:
    """``#rrggbb`` of ``count`` colours; fewer are the beginning of more.

    Args:
        background: ``#rrggbb``.
        most_contrast: To it; beyond, all colours look black, or white.
        steps: Of red, green and blue among which colours are looked for.
    """
    levels = [round(255 * step / (steps - 1)) for step in range(steps)]
    candidates = {
        colour: _as_seen(colour)
        for rgb in itertools.product(levels, repeat=3)
        if least_contrast
        <= contrast(colour := "#{:02x}{:02x}{:02x}".format(*rgb), background)
        <= most_contrast
        and 60 < max(rgb) - min(rgb) < 220  # greys are for what isn't data
    }
    seen_background = _as_seen(background)
    nearest = {c: _apart(seen, seen_background) for c, seen in candidates.items()}
    chosen: list[str] = []
    while len(chosen) < count:
        best = max(nearest, key=lambda colour: (nearest[colour], colour))
        chosen.append(best)
        for colour, seen in candidates.items():
            apart = _apart(seen, candidates[best])
            nearest[colour] = min(nearest[colour], apart)
    return tuple(chosen)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2, from 1 to 21."""
    dark, light = sorted(_luminance(colour) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    red, green, blue = _linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(colour: str) -> Triple:
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))

    def linear(value: float) -> float:
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    return linear(red), linear(green), linear(blue)


@functools.cache
def _as_seen(colour: str) -> tuple[Triple, ...]:
    """In OKLab, by the normal eye and by colour-blind ones."""
    linear = _linear(colour)
    eyes = [linear, *(_times(matrix, linear) for matrix in COLOUR_BLIND.values())]
    return tuple(map(_oklab, eyes))


def _oklab(linear: Triple) -> Triple:
    cones = _times(TO_CONES, linear)
    red, green, blue = (max(0.0, value) ** (1 / 3) for value in cones)
    return _times(TO_LAB, (red, green, blue))


def _apart(one: tuple[Triple, ...], other: tuple[Triple, ...]) -> float:
    """The distance to the eye that tells them apart worst."""
    return min(math.dist(a, b) for a, b in zip(one, other, strict=True))


def _times(matrix: Matrix, vector: Triple) -> Triple:
    first, second, third = (
        sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix
    )
    return first, second, third
