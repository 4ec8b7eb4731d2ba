"""Whether a ratio to plain decoding follows from its tokens and its forwards."""

from __future__ import annotations

from dataclasses import dataclass
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
    run: Generation,
    plain: Generation,
    typical: Undisturbed,
    objective: str,
    *,
    generous: float = 1.3,
) -> Doubt | None:
    """The doubt about a ratio, None where it is explained or nothing can be said.

    Args:
        run: With the strategy.
        plain: Plain decoding that took turns with it.
        typical: Knows what forwards take.
        generous: By what factor measured and expected ratio may differ.
    """
    ours, theirs = _expected(run, typical), _expected(plain, typical)
    if objective == LATENCY or ours is None or theirs is None:
        return None
    measured = [one.stats.seconds_decode for one in (run, plain)]
    expected = [ours, theirs]
    # Ratios are of the same tokens: where answers differ in length, per token.
    counts = [max(1, one.stats.new_tokens - 1) for one in (run, plain)]
    if objective != SPEED:
        scale = counts[1] / counts[0]
        first = [one.stats.seconds_prefill for one in (run, plain)]
        measured = [first[0] + scale * measured[0], first[1] + measured[1]]
        expected = [first[0] + scale * expected[0], first[1] + expected[1]]
        counts = [1, 1]
    if min(*measured, *expected) <= 0:
        return None
    ratio = (measured[1] / counts[1]) / (measured[0] / counts[0])
    explained = (expected[1] / counts[1]) / (expected[0] / counts[0])
    if 1 / generous <= ratio / explained <= generous:
        return None
    per_forward = run.stats.tokens_per_forward
    return Doubt(prompt, strategy, ratio, explained, per_forward)


def _expected(run: Generation, typical: Undisturbed) -> float | None:
    """Seconds of its steps, with forwards as long as forwards of their size are."""
    seconds = 0.0
    for step in run.stats.steps:
        forward = typical.forward(step.rows)
        if forward is None:
            return None
        seconds += forward + step.seconds_draft + step.seconds_rest
    return seconds if run.stats.steps else None
