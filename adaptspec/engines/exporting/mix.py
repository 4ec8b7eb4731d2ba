"""One setting for prompts of several classes, by the time that all of them take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaptspec.engines.exporting.measured import PLAIN_SETTING, Found, Setting
from adaptspec.errors import EngineError


@dataclass(frozen=True)
class Mixed:
    """What a setting brings over a mix of classes.

    Args:
        ratio: Plain decoding's expected time for the mix over the setting's.
    """

    setting: Setting
    ratio: float


def weights_of(found: Found, asked: Mapping[str, float]) -> dict[str, float]:
    """Class -> its share of the prompts; unless told, by how many the workload has of
    each, or where that isn't kept for all classes, by how many were measured.

    Raises:
        EngineError: for a class that wasn't measured, or where nothing is left.
    """
    if not asked:
        counts = {name: of.asked or 0 for name, of in found.classes.items()}
        if not all(counts.values()):
            counts = {name: of.prompts for name, of in found.classes.items()}
        return {name: float(count) for name, count in counts.items()}
    for name in asked:
        if name not in found.classes:
            known = ", ".join(found.classes) or "none"
            raise EngineError(f"--mix: no class {name!r} was measured; were: {known}")
    if not sum(asked.values()) > 0:
        raise EngineError("--mix: one class must weigh more than 0; give CLASS=WEIGHT")
    return {name: asked.get(name, 0.0) for name in found.classes}


def gain(
    found: Found, weights: Mapping[str, float], used: Mapping[str, Setting]
) -> float | None:
    """Plain decoding's expected time for a mix over that with the settings used.

    In parts of a plain answer where the seconds of one weren't kept for every class.

    Args:
        used: Class -> its setting.

    Returns:
        None where a setting wasn't measured on its class.
    """
    mixed = [(found.classes[name], used[name], w) for name, w in weights.items() if w]
    ratios = [ratio for of, setting, _ in mixed if (ratio := of.ratio(setting))]
    if len(ratios) < len(mixed):
        return None
    plain = [of.seconds(PLAIN_SETTING) or 0.0 for of, _, _ in mixed]
    took = [of.seconds(setting) or 0.0 for of, setting, _ in mixed]
    if not all(plain):
        plain, took = [1.0 for _ in mixed], [1 / ratio for ratio in ratios]
    shares = [weight for _, _, weight in mixed]
    whole, part = (
        sum(share * each for share, each in zip(shares, times, strict=True))
        for times in (plain, took)
    )
    return whole / part


def candidates(found: Found) -> list[Setting]:
    """Plain decoding, and what is reliably faster for a class or over all of them."""
    classes = list(found.classes.values())
    if found.everything is not None:
        classes.append(found.everything)
    settings = [setting for of in classes for setting in of.settings]
    return list(dict.fromkeys([PLAIN_SETTING, *settings]))


def best_of_mix(
    found: Found,
    weights: Mapping[str, float],
    among: Sequence[Setting],
) -> Mixed | None:
    """The setting that takes the least time for the mix; the first of equals.

    None where none of them was measured on all of it.
    """
    mixed = [
        Mixed(setting, ratio)
        for setting in among
        if (ratio := gain(found, weights, dict.fromkeys(weights, setting))) is not None
    ]
    return max(mixed, key=lambda one: one.ratio, default=None)
