"""Finds ratios to plain decoding that an answer's steps don't explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from adaptspec.profile import LATENCY, SPEED

if TYPE_CHECKING:
    from adaptspec.decoding.engine import Generation
    from adaptspec_tuner.measuring.disturbances import Undisturbed


@dataclass(frozen=True)
class Doubt:
    """A ratio that nothing explains.

    Args:
        prompt: The prompt's id.
        ratio: As measured.
        expected: From the tokens of each forward, what forwards of such sizes take,
            and what drafting took.
    """

    prompt: str
    strategy: str
    ratio: float
    expected: float
    tokens_per_forward: float

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt!r}: {self.strategy} had {self.ratio:.2f}x plain "
            f"decoding, but its {self.tokens_per_forward:.2f} tokens per forward "
            f"explain {self.expected:.2f}x"
        )


def doubtful(
    prompt: str,
    strategy: str,
    repeats: Sequence[tuple[Generation, Generation]],
    typical: Undisturbed,
    objective: str,
    *,
    generous: float = 1.5,
) -> Doubt | None:
    """The doubt about a prompt's ratio, None where it is explained or can't be told.

    Args:
        repeats: With the strategy, and plain decoding that took turns with it.
        typical: Knows what forwards take.
        generous: By what factor measured and expected ratio may differ.
    """
    if objective == LATENCY:
        return None
    pairs = [_ratios(run, plain, typical, objective) for run, plain in repeats]
    known = [pair for pair in pairs if pair is not None]
    if not known:
        return None
    ratio, explained = (median(values) for values in zip(*known, strict=True))
    if 1 / generous <= ratio / explained <= generous:
        return None
    per_forward = median(run.stats.tokens_per_forward for run, _ in repeats)
    return Doubt(prompt, strategy, ratio, explained, per_forward)


def _ratios(
    run: Generation, plain: Generation, typical: Undisturbed, objective: str
) -> tuple[float, float] | None:
    """As measured and as explained; None where a part isn't known."""
    ours, theirs = _expected(run, typical), _expected(plain, typical)
    if ours is None or theirs is None:
        return None
    # Where answers differ in length: over as many tokens as plain decoding's has.
    counts = [max(1, one.stats.new_tokens - 1) for one in (run, plain)]
    scale = counts[1] / counts[0]
    first = [one.stats.seconds_prefill for one in (run, plain)]
    if objective == SPEED:
        first = [0.0, 0.0]
    measured = first[0] + scale * run.stats.seconds_decode
    expected = first[0] + scale * ours
    if measured <= 0 or expected <= 0:
        return None
    return (
        (first[1] + plain.stats.seconds_decode) / measured,
        (first[1] + theirs) / expected,
    )


def _expected(run: Generation, typical: Undisturbed) -> float | None:
    """Seconds of its steps, with forwards as long as forwards of their size are."""
    seconds = 0.0
    for step in run.stats.steps:
        forward = typical.forward(step.rows)
        if forward is None:
            return None
        seconds += forward + step.seconds_draft + step.seconds_rest
    return seconds if run.stats.steps else None
