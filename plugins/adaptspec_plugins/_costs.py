"""What a hybrid's steps cost and when calling a member is worth its time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median

from adaptspec_plugins._merge import Plan

# Steps whose median says how far forwards are from the measured curve: context, load.
RECENT = 9
# Weight of a new observation in running means.
NEW = 1 / 16
# A member slower than this share of a plain forward is asked only where it pays.
COSTLY = 0.05
# A member cheaper than this share is never worth resting.
FREE = 0.002
# Calls before a costly member is judged: its counts must know something first.
FIRST_CALLS = 2
# Called only where it promises this much more speed: the promise is an estimate. A
# sequence's first calls may promise less, since sequences differ more than that.
MARGIN, FIRST_MARGIN = 1.01, 0.93
# Calls after which a sequence's own experience counts as much as all others'.
OWN = 4
# Expected accepted tokens without the member, the upper ends of all classes but one.
CLASSES = (0.25, 0.5, 1.0, 2.0, 4.0)
# Steps before an idle member is tried again, doubled each time that it doesn't pay:
# at most 1 call in 32, and 1 in 512 where it never pays.
PATIENCE, MOST_PATIENCE = 32, 512
# Steps after which a cheap member is judged.
TRIAL = 16


class ForwardCost:
    """Seconds of a verification of so many rows: a measured curve, scaled by now.

    Args:
        curve: Seconds by rows, non-decreasing.
    """

    def __init__(self, curve: Callable[[int], float]) -> None:
        self._curve = curve
        self._ratios: deque[float] = deque(maxlen=RECENT)
        self._scale = 1.0

    def __call__(self, rows: int) -> float:
        """Expected seconds."""
        return self._curve(rows) * self._scale

    def observe(self, rows: int, seconds: float) -> None:
        """A forward of ``rows`` took ``seconds``."""
        self._ratios.append(max(seconds, 1e-9) / self._curve(rows))
        self._scale = median(self._ratios)


class Mean:
    """A mean that follows: of all observations at first, then a running one."""

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        """Take in one observation."""
        self.count += 1
        self.value += (value - self.value) * max(NEW, 1 / self.count)

    def add_seconds(self, value: float) -> None:
        """Take in a duration; a stray pause counts as four times the mean at most."""
        self.add(min(value, 4 * self.value) if self.count >= 3 else value)


class MemberCost:
    """What one member costs and brings, over all sequences."""

    def __init__(self, needs_draft: bool) -> None:
        self.seconds = Mean()  # of a proposal after the sequence's first
        self.gain = Mean()  # accepted tokens a step that no other member proposed
        self._needs_draft = needs_draft
        self._first_seconds = 0.0  # of all first proposals, with their prompts' tokens
        self._firsts, self._read = 0, 0
        self._tokens = [Mean() for _ in range(len(CLASSES) + 1)]
        self._verify = [Mean() for _ in range(len(CLASSES) + 1)]

    def is_costly(self, plain: float) -> bool:
        """Whether it is asked only where it pays; ``plain`` is t(1) in seconds."""
        return self._needs_draft or self.seconds.value > COSTLY * plain

    def took(self, seconds: float, prompt: int | None) -> None:
        """A proposal took ``seconds``; the sequence's first read ``prompt`` tokens."""
        if prompt is None:
            self.seconds.add_seconds(seconds)
            return
        self._first_seconds += seconds
        self._firsts += 1
        self._read += prompt

    def reading(self, prompt: int) -> float:
        """Seconds that a first proposal takes more than others."""
        more = self._first_seconds - self._firsts * self.seconds.value
        return max(0.0, more) * prompt / max(1, self._read)

    def called(self, before: Plan, after: Plan, spent: float) -> None:
        """Its proposals turned one plan into another; ``spent`` is in after alone."""
        at = _class(before.tokens)
        self._tokens[at].add(after.tokens - before.tokens)
        self._verify[at].add(after.seconds - before.seconds - spent)

    def promise(self, plan: Plan, surplus: float = 0.0) -> Plan | None:
        """The plan expected after calling it, None while that isn't known.

        A class without observations takes those of the nearest less sure one, where
        the member brings more if anything.

        Args:
            surplus: Tokens it brings in this sequence beyond those it brings in all.
        """
        if self.seconds.count + self._firsts < FIRST_CALLS:
            return None
        at = self._known_class(plan)
        return Plan(
            (),
            plan.tokens + max(0.0, self._tokens[at].value + surplus),
            plan.seconds + self.seconds.value + self._verify[at].value,
        )

    def surplus(self, before: Plan, after: Plan) -> float:
        """Tokens that a call brings beyond the mean of its class."""
        mean = self._tokens[self._known_class(before)].value
        return after.tokens - before.tokens - mean

    def _known_class(self, plan: Plan) -> int:
        at = _class(plan.tokens)
        known = [i for i, mean in enumerate(self._tokens) if mean.count]
        return max((i for i in known if i <= at), default=min(known, default=at))


class Turns:
    """Which steps of one sequence call a member. Deterministic but for the clock."""

    def __init__(self, cost: MemberCost) -> None:
        self.cost = cost
        self.calls = 0
        self._idle = 0
        self._awake = 0
        self._patience = PATIENCE
        self._surplus = Mean()

    def wants_call(self, plan: Plan, room: int, prompt: int) -> bool:
        """Whether a costly member pays now; ``plan`` is the step without it.

        Args:
            room: Tokens still to come, over which its first call is paid off.
            prompt: Tokens its first call reads.
        """
        own = self._surplus.value * self._surplus.count / (self._surplus.count + OWN)
        promised = self.cost.promise(plan, own)
        margin = FIRST_MARGIN if self.calls < FIRST_CALLS else MARGIN
        pays = promised is None or promised.rate > margin * plan.rate
        if pays and promised is not None and not self.calls:
            saved = room * (1 / plan.rate - 1 / promised.rate)
            pays = saved > self.cost.reading(prompt)
        if pays:
            self._patience = PATIENCE
            return True
        if self._idle >= self._patience:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
            return True
        return False

    def is_resting(self, plain: float) -> bool:
        """Whether a cheap member is left out, since it doesn't bring what it takes.

        Args:
            plain: Seconds of a plain step: what an accepted token saves at most.
        """
        cost = self.cost
        if self._awake < TRIAL or cost.seconds.value < FREE * plain:
            return False
        if cost.gain.value * plain >= cost.seconds.value:
            self._patience = PATIENCE
            return False
        if self._idle < self._patience:
            return True
        self._awake = 0  # tried again
        self._patience = min(2 * self._patience, MOST_PATIENCE)
        return False

    def judged(self, before: Plan, after: Plan, spent: float) -> None:
        """A costly member's call turned one plan into another in ``spent`` seconds."""
        self._surplus.add(self.cost.surplus(before, after))
        self.cost.called(before, after, spent)

    def skipped(self) -> None:
        """The member was left out of a step."""
        self._idle += 1

    def called(self, seconds: float, prompt: int) -> None:
        """The member proposed in ``seconds``."""
        self._idle = 0
        self._awake += 1
        self.calls += 1
        self.cost.took(seconds, prompt if self.calls == 1 else None)


def _class(tokens: float) -> int:
    return sum(tokens - 1.0 >= end for end in CLASSES)
