"""Stops drafting while it doesn't pay, by the times it measures itself.

The same idea as transformers' heuristic schedule, but judged by tokens per second and
not by acceptance: a draft that is often accepted may still cost more than it saves.
What may be lost to find that out is bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from adaptspec.strategy import Context, Drafter, Outcome
from adaptspec.token_tree import TokenTree

TRIAL_STEPS = 3  # drafting steps before a verdict
PLAIN_EVERY = 48  # drafting steps between two looks at a plain step
FORGET = 0.9  # weight of the past at each step
# Exploration budget: CREDIT plain steps at first, then SHARE of the total time. Unused
# budget accrues up to KEPT plain steps.
CREDIT, SHARE, KEPT = 1.0, 0.01, 8.0
GUESSED = 0.5  # plain steps that a first drafting step is thought to lose
FASTER = 4.0  # how much faster a draft model reads than the target, before it is seen


@dataclass
class Usual:
    """A mean that follows what it sees."""

    value: float | None = None

    def add(self, value: float) -> None:
        """Take in one observation."""
        if self.value is None:
            self.value = value
        else:
            self.value += (1 - FORGET) * (value - self.value)


@dataclass
class GateMemory:
    """What a strategy object knows of its own speed, across requests.

    Times are in seconds.

    Args:
        plain: Of a plain step.
        proposal: Of a proposal that isn't a sequence's first.
        reading: What a sequence's first proposal takes more, for each prompt token.
        length: Tokens of an answer.
        tokens: Emitted by recent drafting steps, older ones counting less.
        seconds: Of those steps, and of proposals since that came to nothing.
        steps: Drafting steps so far.
        lost: To steps that gained no time, less what others gained and less the share
            of time that may be lost; below 0 that share's remainder.
        look: Whether the next step must be plain, to time a plain step again.
    """

    plain: Usual = field(default_factory=Usual)
    proposal: Usual = field(default_factory=Usual)
    reading: Usual = field(default_factory=Usual)
    length: Usual = field(default_factory=Usual)
    tokens: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    lost: float = 0.0
    look: bool = True

    @property
    def gain(self) -> float | None:
        """Seconds that a token of a drafting step saves; None before a verdict."""
        if self.plain.value is None or self.steps < TRIAL_STEPS:
            return None
        return self.plain.value - self.seconds / self.tokens

    def wants(self, emitted: int, reading: float) -> bool:
        """Whether the next step is to draft.

        Args:
            emitted: Tokens of this answer so far.
            reading: Seconds the proposal takes more than others, 0 after the first.
        """
        plain = self.plain.value
        if plain is None or self.look:
            self.look = False
            return False
        gain = self.gain
        if gain is not None and gain > 0:
            # An answer longer than usual is thought to be half done.
            left = max((self.length.value or 0.0) - emitted, float(emitted))
            return gain * left >= reading
        risk = GUESSED * plain
        if self.steps:
            recent = (1 - FORGET**self.steps) / (1 - FORGET)
            risk = max(0.0, self.seconds - self.tokens * plain) / recent
        return self.lost + risk + reading <= CREDIT * plain

    def passed(self, seconds: float, proposing: float = 0.0) -> None:
        """A step without drafts, ``proposing`` of its time going into an empty tree."""
        self.plain.add(seconds - proposing)
        self.seconds += proposing
        self._lose(seconds, proposing)

    def drafted(self, emitted: int, seconds: float, reading: float) -> None:
        """A step with drafts, which read the prompt for ``reading`` of its time."""
        self.tokens = FORGET * self.tokens + emitted
        self.seconds = FORGET * self.seconds + seconds - reading
        self.steps += 1
        self.look = self.steps % PLAIN_EVERY == 0
        if self.plain.value is not None:
            self._lose(seconds, seconds - emitted * self.plain.value)

    def _lose(self, seconds: float, lost: float) -> None:
        """A step of so many seconds lost some of them, or gained them if negative."""
        self.lost += max(lost, -max(self.lost, 0.0))  # gains are no licence to lose
        self.lost -= SHARE * seconds
        if self.plain.value is not None:
            self.lost = max(self.lost, -KEPT * self.plain.value)


class Gate(Drafter):
    """A drafter that is asked only while its drafts gain time.

    The output doesn't depend on it: what is proposed never changes what is emitted, or
    its distribution. Which steps draft depends on measured times, so under sampled
    proposals two runs of one seed may differ.

    Args:
        inner: Must cope with steps for which it wasn't asked.
        memory: Shared by the sequences of one strategy object.
        clock: Seconds.
        prompt: Tokens of the prompt.
        reads: Whether a draft model has to read them first.
    """

    def __init__(
        self,
        inner: Drafter,
        memory: GateMemory,
        clock: Callable[[], float],
        prompt: int = 1,
        reads: bool = False,
    ) -> None:
        self._inner, self._memory, self._clock = inner, memory, clock
        self._prompt, self._reads = prompt, reads
        self._begun = clock()
        self._prefill = 0.0
        self._started = self._proposing = 0.0
        self._emitted = self._asked = 0

    def propose(self, context: Context) -> TokenTree:
        """The inner drafter's proposal, or nothing."""
        self._started, self._proposing = self._clock(), 0.0
        if not self._memory.wants(self._emitted, self._reading()):
            return TokenTree.root_only(context.ids[-1])
        tree = self._inner.propose(context)
        self._proposing = self._clock() - self._started
        self._asked += 1
        return tree

    def observe(self, outcome: Outcome) -> None:
        """Pass it on, and judge the step."""
        if outcome.tree is None:
            self._prefill = self._clock() - self._begun
        self._inner.observe(outcome)
        self._emitted += len(outcome.emitted)
        if outcome.tree is None:
            return
        seconds = self._clock() - self._started
        reading = self._learn_proposal() if self._proposing else 0.0
        if len(outcome.tree) > 1:
            self._memory.drafted(len(outcome.emitted), seconds, reading)
        else:
            self._memory.passed(seconds, self._proposing)

    def close(self) -> None:
        """Pass it on, and remember the answer's length."""
        if self._emitted:
            self._memory.length.add(self._emitted)
        self._inner.close()

    def _reading(self) -> float:
        """Seconds that the sequence's first proposal is expected to take more."""
        if self._asked or not self._reads:
            return 0.0
        seen = self._memory.reading.value
        return self._prefill / FASTER if seen is None else seen * self._prompt

    def _learn_proposal(self) -> float:
        """Take in what the proposal took; return what of it was for the prompt."""
        memory = self._memory
        if self._asked > 1:
            memory.proposal.add(self._proposing)
            return 0.0
        if not self._reads:
            return 0.0
        # Before any other was seen all of it counts.
        reading = max(0.0, self._proposing - (memory.proposal.value or 0.0))
        memory.reading.add(reading / self._prompt)
        return reading
