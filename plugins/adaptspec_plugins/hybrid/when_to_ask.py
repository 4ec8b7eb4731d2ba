"""Whether asking a costly member, such as a draft model, pays in the next step."""

from __future__ import annotations

from adaptspec.running_mean import RunningMean
from adaptspec_plugins.hybrid.plan import TreePlan


class CallValue:
    """What asking one member brings and takes, over all sequences.

    Steps are told apart by the tokens that are expected without the member, since a
    call brings less where the others know how the text goes on.

    Args:
        hoped: Tokens that a call is taken to bring before any was made.
        hoped_calls: The hope counts as so many calls, and what all calls brought as
            so many of each kind of step.
        kinds: How many kinds of steps are told apart, half an expected token each.
        trial_share: Of all time, what may be lost to calls that don't promise to pay.
    """

    def __init__(
        self,
        hoped: float = 2.0,
        hoped_calls: int = 1,
        kinds: int = 6,
        trial_share: float = 0.005,
    ) -> None:
        self.proposal = (
            RunningMean()
        )  # seconds of a proposal after the sequence's first
        self.candidate = RunningMean()  # seconds for each candidate of those proposals
        self._reading = (
            RunningMean()
        )  # seconds for each prompt token of a first proposal
        self._tokens, self._seconds = RunningMean(hoped, hoped_calls), RunningMean()
        self._by_kind = [(RunningMean(), RunningMean()) for _ in range(kinds)]
        self._weight = hoped_calls
        self._trial_share, self._spare = trial_share, 0.0  # seconds

    def gain(self, plan: TreePlan, pace: float) -> float:
        """Tokens a call is expected to bring beyond those its time is worth.

        Args:
            plan: The step without the call.
            pace: Tokens per second of the steps around.
        """
        tokens, seconds = self._by_kind[self._kind(plan)]
        known = tokens.count / (tokens.count + self._weight)
        brings = self._tokens.value + known * (tokens.value - self._tokens.value)
        takes = self._seconds.value + known * (seconds.value - self._seconds.value)
        return brings - pace * takes

    def reading(self, prompt: int) -> float:
        """Seconds that a sequence's first call takes more, for its prompt."""
        return self._reading.value * prompt

    def affords(self, seconds: float) -> bool:
        """Whether so many may be lost to see whether calls pay by now."""
        return seconds <= self._spare

    def passed(self, seconds: float) -> None:
        """A step took ``seconds``."""
        self._spare += self._trial_share * seconds

    def called(self, before: TreePlan, after: TreePlan, pace: float) -> None:
        """A call turned one plan into another, at that pace."""
        brought = after.tokens - before.tokens
        took = after.seconds - before.seconds
        tokens, seconds = self._by_kind[self._kind(before)]
        for mean in (self._tokens, tokens):
            mean.add(brought)
        for mean in (self._seconds, seconds):
            mean.add(took)
        self._pay(took - brought / pace)

    def proposed(self, seconds: float, candidates: int) -> None:
        """A proposal, not a sequence's first, took ``seconds``."""
        self.proposal.add_seconds(seconds)
        if candidates:
            self.candidate.add_seconds(seconds / candidates)

    def read(self, seconds: float, prompt: int, candidates: int) -> float:
        """A sequence's first proposal took ``seconds``; those of reading the prompt."""
        reading = max(0.0, seconds - self.candidate.value * max(0, candidates - 1))
        self._reading.add(reading / prompt)
        self._pay(reading)
        return reading

    def _pay(self, seconds: float) -> None:
        self._spare = max(0.0, self._spare - max(0.0, seconds))

    def _kind(self, plan: TreePlan) -> int:
        return min(int(2 * (plan.tokens - 1.0)), len(self._by_kind) - 1)
