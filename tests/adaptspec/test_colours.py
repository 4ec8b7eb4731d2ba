"""Colours differ for every eye and stand out from the page."""

from __future__ import annotations

import itertools
import math

import pytest

from adaptspec.charts import DARK, LIGHT
from adaptspec.colours import contrast, distinct_colours

# Linear sRGB as seen without the red and without the green cones, by another model than
# the module's: Vienot, Brettel and Mollon 1999.
VIENOT = {
    "protan": [
        [0.11238, 0.88762, 0.0],
        [0.11238, 0.88762, 0.0],
        [0.00401, -0.00401, 1.0],
    ],
    "deutan": [
        [0.29275, 0.70725, 0.0],
        [0.29275, 0.70725, 0.0],
        [-0.02234, 0.02234, 1.0],
    ],
}


def linear(colour: str) -> list[float]:
    return [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]


def seen(colour: str, matrix: list[list[float]]) -> list[float]:
    """As a screen would show it."""
    values = linear(colour)
    mixed = [sum(a * b for a, b in zip(row, values, strict=True)) for row in matrix]
    return [max(0.0, value) ** (1 / 2.2) for value in mixed]


@pytest.mark.parametrize(
    ("one", "other", "ratio"),
    [
        ("#000000", "#ffffff", 21.0),
        ("#ffffff", "#ffffff", 1.0),
        ("#767676", "#ffffff", 4.54),  # the lightest grey of AA, as WebAIM has it
        ("#ff0000", "#ffffff", 4.0),
        ("#0000ff", "#ffffff", 8.59),
    ],
)
def test_contrast_is_wcags(one: str, other: str, ratio: float) -> None:
    assert contrast(one, other) == pytest.approx(ratio, abs=0.005)
    assert contrast(other, one) == contrast(one, other)


@pytest.mark.parametrize("background", [LIGHT, DARK])
def test_colours_stand_out_and_are_never_repeated(background: str) -> None:
    colours = distinct_colours(60, background)
    assert len(set(colours)) == 60
    assert min(contrast(colour, background) for colour in colours) >= 3
    assert distinct_colours(7, background) == colours[:7]


@pytest.mark.parametrize("background", [LIGHT, DARK])
@pytest.mark.parametrize("eye", sorted(VIENOT))
def test_the_colour_blind_tell_the_first_eight_apart(background: str, eye: str) -> None:
    shown = [seen(colour, VIENOT[eye]) for colour in distinct_colours(8, background)]
    assert min(math.dist(a, b) for a, b in itertools.combinations(shown, 2)) > 0.1
