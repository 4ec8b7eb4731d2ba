"""How a tune's time is shared out among its phases."""

from __future__ import annotations

import math
from collections.abc import Callable


class TimeBudget:
    """The time until a deadline, and which phase may use how much of it.

    Where the budget is a number of trials, the deadline is infinite and so is every
    share. Each share is of what is left when it is asked for.

    Args:
        clock: Seconds; the budget begins now.
        deadline: On the clock.
        plain: Most of the budget that goes to plain decoding.
        confirming: Of the budget, kept back for the confirmation; less where it needs
            less.
        least_search: Of what is left after plain decoding, for the search at least,
            whatever confirming takes.
        opening: Of the search, for the settings that open the race of every class.
        replays: Of the search, for trials without the target, if all strategies replay.
        late: Seconds past the deadline that a last prediction may take.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        deadline: float,
        *,
        plain: float = 0.25,
        confirming: float = 0.45,
        least_search: float = 0.25,
        opening: float = 0.6,
        replays: float = 0.3,
        late: float = 1.0,
    ) -> None:
        self.clock, self.deadline = clock, deadline
        self._least_search, self._opening = least_search, opening
        self._confirming = confirming
        self._replays, self._late = replays, late
        left = max(0.0, self.left)
        self._plain_end = self._search_end = deadline
        self._kept_back = 0.0
        if math.isfinite(left):
            self._plain_end -= left * (1 - plain)
            self._kept_back = left * confirming
            self._search_end -= self._kept_back

    @property
    def left(self) -> float:
        """Seconds until the deadline; negative behind it."""
        return self.deadline - self.clock()

    @property
    def left_for_search(self) -> float:
        """Seconds until the search ends."""
        return self._search_end - self.clock()

    @property
    def searching(self) -> bool:
        """Whether the search may go on."""
        return self.clock() < self._search_end

    @property
    def decoding_plainly(self) -> bool:
        """Whether another prompt may be decoded plainly."""
        return self.clock() < self._plain_end

    def keep_back(self, least: float, whole: float = math.inf) -> None:
        """End the search so early that there is time for confirming.

        Args:
            least: Seconds without which it is of no use.
            whole: Seconds of all repeats; more than that isn't kept back.
        """
        most = (1 - self._least_search) * max(0.0, self.left)
        kept = min(max(least, min(whole, self._kept_back)), most)
        if math.isfinite(self.deadline):
            self._search_end = self.deadline - kept

    def whole_for(self, confirming: float) -> float:
        """Seconds of a budget whose part for confirming is so long; 0 without one."""
        return confirming / self._confirming if math.isfinite(self.deadline) else 0.0

    def for_opening(self) -> float:
        """Seconds in which every class's race is opened."""
        return (self._search_end - self.clock()) * self._opening

    def replaying(self, part: float) -> Callable[[], bool]:
        """Whether trials that begin now, without the target, may go on.

        Args:
            part: Of the strategies, those that replay.
        """
        return self._within(self._replays * part)

    def confirming(self, share: float, enough: int) -> Callable[[float, int], bool]:
        """Whether another prompt of a class may begin, given the seconds that it takes
        and how many are finished.

        Args:
            share: Seconds of this class; until ``enough`` prompts are finished, those
                of others may be used.
        """
        end = self.clock() + share

        def in_time(seconds: float, prompts: int) -> bool:
            last = end if prompts >= enough else self.deadline
            return self.clock() + seconds <= last

        return in_time

    def predicting(self, seconds: float) -> bool:
        """Whether a prediction that takes ``seconds`` may begin."""
        return seconds <= max(self._late, self.left)

    def _within(self, share: float) -> Callable[[], bool]:
        """Whether no more than ``share`` of the search has passed from now on."""
        end = self.clock() + share * max(0.0, self._search_end - self.clock())
        return lambda: self.clock() < end


def for_costs(budget: float, share: float = 0.05, longest: float = 30.0) -> float:
    """Seconds in which forwards are measured, once an environment.

    Args:
        budget: Of the tune, in seconds.
        share: Of the budget.
        longest: Whatever the budget.
    """
    return min(longest, share * budget)
