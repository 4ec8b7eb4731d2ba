"""Stops drafting while it doesn't pay, by the times it measures itself.

The same idea as transformers' heuristic schedule, but judged by tokens per second and
not by acceptance: a draft that is often accepted may still cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adaptspec.decoding.tree import TokenTree
from adaptspec.strategy import Context, Drafter, Outcome

TRIAL_STEPS = 3  # drafting steps before a verdict
FIRST_WAIT = 8  # plain steps after the first bad verdict; each further one doubles it
LONGEST_WAIT = 256
PLAIN_EVERY = 48  # drafting steps between two looks at a plain step
FORGET = 0.9  # weight of the past at each step


@dataclass
class GateMemory:
    """What a strategy object knows of its own speed, across requests.

    Args:
        plain: Seconds of a plain step, None before the first.
        tokens: Tokens of recent drafting steps, older ones counting less.
        seconds: What those steps took.
        steps: Drafting steps since drafting was last taken up.
        wait: Plain steps to go before it is taken up again.
        next_wait: How long the next pause would be.
    """

    plain: float | None = None
    tokens: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    wait: int = 1  # the first step shows what a plain one takes
    next_wait: int = FIRST_WAIT

    def record(self, drafted: bool, emitted: int, seconds: float) -> None:
        """Learn from a step and decide about the next ones."""
        if not drafted:
            if self.plain is None:
                self.plain = seconds
            else:
                self.plain += (1 - FORGET) * (seconds - self.plain)
            return
        self.tokens = FORGET * self.tokens + emitted
        self.seconds = FORGET * self.seconds + seconds
        self.steps += 1
        if self.steps < TRIAL_STEPS or self.plain is None:
            return
        if self.seconds > self.tokens * self.plain:
            self.wait, self.next_wait = (
                self.next_wait,
                min(LONGEST_WAIT, 2 * self.next_wait),
            )
            self.tokens = self.seconds = 0.0
            self.steps = 0
        elif self.steps % PLAIN_EVERY == 0:
            self.wait = 1
            self.next_wait = FIRST_WAIT


class Gate(Drafter):
    """A drafter that is asked only while its drafts gain time.

    The output doesn't depend on it: what is proposed never changes what is emitted, or
    its law. Which steps draft depends on measured times, so under sampled proposals two
    runs of one seed may differ.

    Args:
        inner: Must cope with steps for which it wasn't asked.
        memory: Shared by the sequences of one strategy object.
        clock: Seconds.
    """

    def __init__(
        self, inner: Drafter, memory: GateMemory, clock: Callable[[], float]
    ) -> None:
        self._inner, self._memory, self._clock = inner, memory, clock
        self._started = 0.0
        self._drafted = False

    def propose(self, context: Context) -> TokenTree:
        """The inner drafter's proposal, or nothing."""
        self._started = self._clock()
        if self._memory.wait > 0:
            self._memory.wait -= 1
            self._drafted = False
            return TokenTree.root_only(context.ids[-1])
        tree = self._inner.propose(context)
        self._drafted = len(tree) > 1
        return tree

    def observe(self, outcome: Outcome) -> None:
        """Pass it on, and judge the step."""
        self._inner.observe(outcome)
        if outcome.tree is not None:
            seconds = self._clock() - self._started
            self._memory.record(self._drafted, len(outcome.emitted), seconds)

    def close(self) -> None:
        """Pass it on."""
        self._inner.close()
