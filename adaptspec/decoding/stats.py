"""Per-step and per-run counts and times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class StepStats(NamedTuple):
    """One step; times in seconds."""

    proposed: int
    accepted: int
    emitted: int
    seconds_target: float
    seconds_draft: float
    seconds_rest: float
    depth: int = 0  # of the deepest candidate
    rows: int = 1  # of the verified tree, root and probes included
    forced: int = 0  # of the accepted, what a grammar forced

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.seconds_target + self.seconds_draft + self.seconds_rest


@dataclass
class RunStats:
    """One generation. The first token comes from the prefill, the rest from steps.

    Args:
        seconds_prefill: From the beginning to the first token: the drafter's start, the
            prompt's forward, and what the drafter does with it.
        passed_over: Steps for which the guard didn't ask the drafter.
        seconds_gained: What the guard estimates that drafting gained over plain
            decoding, below 0 where it lost; None without a guard.
        plain_step: Seconds that decoding a token without drafts takes here, as the
            guard timed it; None before it did, and without a guard.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds_prefill: float = 0.0
    steps: list[StepStats] = field(default_factory=list)
    passed_over: int = 0
    seconds_gained: float | None = None
    plain_step: float | None = None

    @property
    def drafted(self) -> int:
        """Steps that verified candidates; the others decoded plainly."""
        return sum(step.proposed > 0 for step in self.steps)

    @property
    def target_forwards(self) -> int:
        """Decoding steps, the prefill not counted."""
        return len(self.steps)

    @property
    def proposed(self) -> int:
        """Candidates verified."""
        return sum(step.proposed for step in self.steps)

    @property
    def accepted(self) -> int:
        """Candidates accepted and emitted."""
        return sum(step.accepted for step in self.steps)

    @property
    def forced(self) -> int:
        """Of the accepted candidates, those that a grammar forced, not a drafter."""
        return sum(step.forced for step in self.steps)

    @property
    def acceptance(self) -> float:
        """Accepted / proposed, 0 where nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Mean tokens committed per step; 1 is plain decoding."""
        return (
            sum(s.emitted for s in self.steps) / len(self.steps) if self.steps else 1.0
        )

    @property
    def seconds_target(self) -> float:
        """Time in the target's forwards, the prefill not counted."""
        return sum(step.seconds_target for step in self.steps)

    @property
    def seconds_draft(self) -> float:
        """Time in the drafter."""
        return sum(step.seconds_draft for step in self.steps)

    @property
    def seconds_rest(self) -> float:
        """Time in acceptance, cache and bookkeeping."""
        return sum(step.seconds_rest for step in self.steps)

    @property
    def seconds_decode(self) -> float:
        """Time after the prefill."""
        return self.seconds_target + self.seconds_draft + self.seconds_rest

    @property
    def ratio(self) -> float | None:
        """How many times as fast as plain decoding, the prompt included.

        As the guard estimates; None without a guard or a step.
        """
        seconds = self.seconds_prefill + self.seconds_decode
        if self.seconds_gained is None or seconds <= 0:
            return None
        return max(0.0, 1 + self.seconds_gained / seconds)

    @property
    def positions(self) -> list[tuple[int, int]]:
        """By depth from 1: steps that accepted a candidate there, and that had one."""
        deepest = max((step.depth for step in self.steps), default=0)
        return [
            (
                sum(step.accepted >= depth for step in self.steps),
                sum(step.depth >= depth for step in self.steps),
            )
            for depth in range(1, deepest + 1)
        ]

    @property
    def latency_p95(self) -> float:
        """Milliseconds that 95% of the tokens took at most; 0 without a step.

        A step's time is shared equally by the tokens it committed.
        """
        shares = sorted(
            (1e3 * step.seconds / step.emitted, step.emitted)
            for step in self.steps
            if step.emitted
        )
        left = 0.95 * sum(count for _, count in shares)
        for milliseconds, count in shares:
            left -= count
            if left <= 1e-9:
                return milliseconds
        return 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed over the tokens after the first; 0 without a step."""
        emitted = sum(step.emitted for step in self.steps)
        return emitted / self.seconds_decode if self.seconds_decode > 0 else 0.0
