"""What a hybrid's steps cost and when calling a member is worth its time."""

from __future__ import annotations

from adaptspec_plugins.hybrid.pace import Mean
from adaptspec_plugins.hybrid.plan import Plan

# A member slower than this share of a plain forward is asked only where it pays.
COSTLY = 0.05
# A member cheaper than this share is never worth resting.
FREE = 0.002
# Calls of a costly member before it promises anything.
FIRST_CALLS = 2
# Called only where it promises this many times what it takes: the promise is an
# estimate, and of the steps that promise most some do so by chance.
MARGIN = 1.3
# Maximum share of the total time that exploratory calls may lose.
EXPLORED = 0.004
# The same within one sequence, of its own or a usual sequence's time. It keeps short
# answers from paying for exploration: a first call may take three times the estimate.
SEQUENCE_EXPLORED = 0.03
# Plain steps that exploratory calls may lose at the start.
CREDIT = 1.5
# A draft model that pays is at least so much faster than the target.
FASTER = 3.0
# Times that a sequence's first call, which reads its prompt, must promise to be repaid:
# the answer may end sooner.
SAFE = 2.0
# A sequence's calls that need no idle steps before them.
TRIALS = 1
# Calls after which a sequence's own experience counts as much as all others'.
OWN = 4
# Expected accepted tokens without the member, the upper ends of all classes but one.
CLASSES = (0.25, 0.5, 1.0, 2.0, 4.0)
# Tokens that a costly member brings to a step, as if seen so often in each class: it
# is less than most draft models bring (1.2 to 3.4 measured), as the first few
# observations must not promise too much.
GAIN, GAIN_SEEN = 1.2, 6
# Steps before an idle member is tried again, doubled each time that it doesn't pay:
# at most 1 call in 32, and 1 in 512 where it never pays.
PATIENCE, MOST_PATIENCE = 32, 512
# Steps after which a cheap member is judged.
TRIAL = 16


class Exploration:
    """Seconds that may be lost, and have been lost, to find out what pays."""

    def __init__(self) -> None:
        self.typical = Mean()  # seconds of a sequence that ended
        self._total = 0.0
        self._lost = 0.0

    def fresh(self) -> SequenceExploration:
        """A new sequence's, which counts here, too."""
        return SequenceExploration(self)

    def passed(self, seconds: float) -> None:
        """A step took ``seconds``."""
        self._total += seconds

    def affords(self, seconds: float, plain: float) -> bool:
        """Whether as much more may be lost; ``plain`` is a plain step's time."""
        return self._lost + seconds <= EXPLORED * self._total + CREDIT * plain

    def lost(self, seconds: float) -> None:
        """A call took ``seconds`` more than its tokens saved."""
        self._lost += seconds


class SequenceExploration:
    """A sequence's part in the :class:`Exploration` of all, bounded by its own length.

    Args:
        whole: Of all sequences.
    """

    def __init__(self, whole: Exploration) -> None:
        self._whole = whole
        self._total = 0.0
        self._lost = 0.0

    def passed(self, seconds: float) -> None:
        """A step took ``seconds``."""
        self._total += seconds
        self._whole.passed(seconds)

    def ended(self) -> None:
        """The sequence has."""
        if self._total:
            self._whole.typical.add(self._total)

    def affords(self, seconds: float, plain: float) -> bool:
        """Whether as much more may be lost; ``plain`` is a plain step's time."""
        typical = self._whole.typical
        bearable = SEQUENCE_EXPLORED * max(self._total, typical.value)
        if typical.count and self._lost + seconds > bearable:
            return False
        return self._whole.affords(seconds, plain)

    def lost(self, seconds: float) -> None:
        """A call took ``seconds`` more than its tokens saved."""
        self._lost += max(0.0, seconds)
        self._whole.lost(max(0.0, seconds))


class MemberCost:
    """What one member costs and brings, over all sequences."""

    def __init__(self, needs_draft: bool) -> None:
        self.seconds = Mean()  # of a proposal after the sequence's first
        self.forward = Mean()  # seconds for each candidate of those proposals
        self.often = Mean()  # share of steps in which a call promises to pay
        self.gain = Mean()  # accepted tokens a step that no other member proposed
        self._needs_draft = needs_draft
        self._first_seconds = 0.0  # of all first proposals, with their prompts' tokens
        self._firsts, self._read = 0, 0
        self._tokens = [Mean(GAIN, GAIN_SEEN) for _ in range(len(CLASSES) + 1)]
        self._verify = [Mean() for _ in range(len(CLASSES) + 1)]

    def is_costly(self, plain: float) -> bool:
        """Whether it is asked only where it pays; ``plain`` is t(1) in seconds."""
        return self._needs_draft or self.seconds.value > COSTLY * plain

    def took(self, seconds: float, prompt: int | None, proposed: int) -> None:
        """A proposal took ``seconds``; the sequence's first read ``prompt`` tokens."""
        if prompt is None:
            self.seconds.add_seconds(seconds)
            if proposed:
                self.forward.add_seconds(seconds / proposed)
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

        Args:
            surplus: Tokens it brings in this sequence beyond those it brings in all.
        """
        if self.seconds.count + self._firsts < FIRST_CALLS:
            return None
        at = _class(plan.tokens)
        return Plan(
            (),
            plan.tokens + max(0.0, self._tokens[at].value + surplus),
            plan.seconds + self.seconds.value + self._verify[at].value,
        )

    def surplus(self, before: Plan, after: Plan) -> float:
        """Tokens that a call brings beyond the mean of its class."""
        mean = self._tokens[_class(before.tokens)].value
        return after.tokens - before.tokens - mean


class Turns:
    """Which steps of one sequence call a member. Deterministic but for the clock."""

    def __init__(self, cost: MemberCost, exploration: SequenceExploration) -> None:
        self.cost = cost
        self.calls = 0
        self._exploration = exploration
        self._exploring = False
        self._idle = 0
        self._awake = 0
        self._patience = PATIENCE
        self._surplus = Mean()

    def wants_call(
        self, plan: Plan, pace: float, room: int, prompt: int, unread: float
    ) -> bool:
        """Whether a costly member pays now; ``plan`` is the step without it.

        Args:
            pace: Tokens per second of the steps around.
            room: Tokens still to come, over which its first call is paid off.
            prompt: Tokens its first call reads.
            unread: Seconds in which the target would read them.
        """
        own = self._surplus.value * self._surplus.count / (self._surplus.count + OWN)
        promised = self.cost.promise(plan, own)
        reading = 0.0 if self.calls else self.cost.reading(prompt)
        self._exploring = False
        gain = risk = 0.0
        if promised is None:  # as if nothing came of a forward's time
            risk = plan.seconds + (0.0 if self.calls else unread / FASTER)
        else:
            taken = pace * (promised.seconds - plan.seconds)
            gain = promised.tokens - plan.tokens - taken
            pays = promised.tokens - plan.tokens > MARGIN * taken
            self.cost.often.add(float(pays))
            calls = 1 + self.cost.often.value * room / max(plan.tokens, 1.0)
            if pays and gain * calls > SAFE * pace * reading:
                self._patience = PATIENCE
                return True
            risk = reading - gain / pace
        if self.calls >= TRIALS and self._idle < self._patience:
            return False
        if not self._exploration.affords(max(0.0, risk), plan.seconds):
            return False
        self._exploring = True
        if self.calls >= TRIALS:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
        return True

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

    def judged(self, before: Plan, after: Plan, spent: float, pace: float) -> None:
        """A costly member's call turned one plan into another in ``spent`` seconds."""
        if self._exploring:
            self._exploration.lost((before.worth(pace) - after.worth(pace)) / pace)
        self._surplus.add(self.cost.surplus(before, after))
        self.cost.called(before, after, spent)

    def skipped(self) -> None:
        """The member was left out of a step."""
        self._idle += 1

    def called(self, seconds: float, prompt: int, proposed: int) -> None:
        """The member proposed so many candidates in ``seconds``."""
        self._idle = 0
        self._awake += 1
        self.calls += 1
        self.cost.took(seconds, prompt if self.calls == 1 else None, proposed)


def _class(tokens: float) -> int:
    return sum(tokens - 1.0 >= end for end in CLASSES)
