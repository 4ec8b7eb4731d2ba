"""Generations that another engine runs in one piece, told in our own terms."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptspec.decoding.engine import Generation
    from adaptspec.strategy import BaselineRun


class Whole:
    """Another engine's generation: all of its time is in one piece.

    Args:
        run: Generates the whole answer.
    """

    def __init__(self, run: Callable[[], Generation]) -> None:
        self._run = run
        self._result: Generation | None = None

    def __iter__(self) -> Generator[list[int], None, None]:
        self._result = self._run()
        yield list(self._result.token_ids)

    @property
    def result(self) -> Generation:
        """What was generated; it must have run."""
        assert self._result is not None
        return self._result


def whole_generation(
    token_ids: list[int],
    seconds: float,
    seconds_to_first: float,
    *,
    first_tokens: int = 1,
    forwards: int = 0,
    proposed: int = 0,
    accepted: int = 0,
) -> Generation:
    """An answer with one step that took all of the decoding.

    Args:
        seconds: From the request to the last token.
        seconds_to_first: Of these, until the first tokens came.
        first_tokens: How many came then.
        forwards: Of the target, the prompt's left out; 0 where they aren't counted.
        proposed: Draft tokens verified.
        accepted: Draft tokens accepted.
    """
    from adaptspec.decoding.engine import Generation
    from adaptspec.decoding.stats import RunStats, StepStats

    nothing = StepStats(0, 0, 0, 0.0, 0.0, 0.0)
    whole = nothing._replace(
        proposed=proposed,
        accepted=accepted,
        emitted=max(0, len(token_ids) - first_tokens),
        seconds_target=max(0.0, seconds - seconds_to_first),
    )
    stats = RunStats(
        new_tokens=len(token_ids),
        seconds_prefill=seconds_to_first,
        steps=[whole, *[nothing] * max(0, forwards - 1)],
    )
    return Generation(token_ids, stats, "length")


def generation_of_baseline(run: BaselineRun) -> Generation:
    """What a baseline's run took."""
    return whole_generation(
        run.token_ids,
        run.seconds,
        run.seconds_prefill or 0.0,
        first_tokens=run.first_tokens,
        forwards=run.target_forwards or 0,
    )
