"""The guard: decides before each step whether to draft, so that drafting loses little.

A drafter is asked while it doesn't lose more than a budget allows. Drafted steps that
lose time draw on the budget, drafted steps that gain time refill it, and time that
passes adds a small share of itself. So a drafter that stops paying is passed over soon,
tried again once the budget affords it, and back after the first trial that pays.

Tokens per second decide and not the acceptance rate: a draft that is often accepted may
still cost more than it saves. All times are in plain steps, the time that decoding one
token without drafts takes here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from statistics import mean, median_low
from typing import NamedTuple

from adaptspec.running_mean import RunningMean
from adaptspec.strategy import Context, Drafter, Outcome
from adaptspec.token_tree import TokenTree


class Budget:
    """Time that may be lost to what may not pay.

    Args:
        share: Of all time that passes.
        balance: What may be lost to begin with.
        least: The balance is no lower, so that it recovers.
        most: The balance is no higher: what was gained is no licence to lose as much.
    """

    def __init__(
        self,
        share: float,
        balance: float = 0.0,
        least: float = -float("inf"),
        most: float = float("inf"),
    ) -> None:
        self.balance = balance
        self.most = most
        self._share, self._least = share, least

    def limit(self, most: float) -> None:
        """Set what the balance may be at most."""
        self.most = most
        self.balance = min(self.balance, most)

    def affords(self, time: float) -> bool:
        """Whether so much may be lost now."""
        return time <= self.balance

    def passed(self, time: float, slower: float = 1.0) -> None:
        """So much time passed; a share so many times smaller than usual is added."""
        self.pay(-self._share * time / slower)

    def pay(self, time: float) -> None:
        """So much was lost, or gained if negative."""
        self.balance = min(max(self.balance - time, self._least), self.most)


class PlainTimes:
    """What decoding without drafts takes on one model, in seconds.

    Args:
        recent: The middle of so many steps is believed, so that a pause isn't.
    """

    def __init__(self, recent: int = 5) -> None:
        self._steps: deque[float] = deque(maxlen=recent)
        self._prompts: deque[float] = deque(maxlen=recent)

    @property
    def step(self) -> float | None:
        """Of a step; None before any was seen."""
        return median_low(self._steps) if self._steps else None

    @property
    def prompt_token(self) -> float | None:
        """Of reading a token of a prompt; None before any was read."""
        return median_low(self._prompts) if self._prompts else None

    def add_step(self, seconds: float) -> None:
        """A step without drafts took so long."""
        self._steps.append(seconds)

    def add_prompt(self, seconds: float, tokens: int) -> None:
        """Reading a prompt of ``tokens`` took so long."""
        self._prompts.append(seconds / tokens)


class DraftedStep(NamedTuple):
    """A step that verified candidates: tokens emitted, its time, the candidates."""

    emitted: int
    seconds: float
    nodes: int


class GuardMemory:
    """What is known of one strategy's speed on one engine, across its sequences.

    Args:
        plain: Times without drafts, which all strategies of an engine share.
        credit: Plain steps that may be lost before anything is known.
        share: Of all time, what may be lost. Half of it after a trial that failed,
            where earlier sequences didn't gain.
        answer: Tokens that an answer is taken to have until answers are known.
        candidate: Plain steps that a candidate is thought to take before any was seen.
        fewest: A step is drafted if it may verify so many candidates.
        faster: How much faster a draft model reads than the target, before it is seen.
        prompt_token: Plain steps that reading a prompt's token takes, before it is
            seen.
        look_share: Of all time, what may be lost to timing plain steps while drafting
            pays.
        pause: A drafted step counts as so many times the usual one at most.
        kept: What of a sequence's gains, and of those of an average answer before, may
            be lost again, up to ``most_kept`` plain steps.
        readings_saved: For how many readings of a prompt may be saved.
    """

    def __init__(
        self,
        plain: PlainTimes | None = None,
        credit: float = 1.0,
        share: float = 0.0075,
        answer: int = 200,
        candidate: float = 0.1,
        fewest: int = 3,
        faster: float = 4.0,
        prompt_token: float = 0.125,
        look_share: float = 0.002,
        pause: float = 2.0,
        kept: float = 0.25,
        most_kept: float = 5.0,
        readings_saved: float = 4.0,
    ) -> None:
        self.plain = plain or PlainTimes()
        self.credit, self.share = credit, share
        self._answer, self._faster = answer, faster
        self._candidate, self._fewest = candidate, fewest
        self._prompt_token, self._look_share = prompt_token, look_share
        self._pause, self._kept, self._most_kept = pause, kept, most_kept
        self._readings_saved = readings_saved
        self.budget = Budget(share, float("inf"), least=-credit)
        self._failed = False  # whether the last drafted step lost
        # Reading long prompts with a draft model must be saved for.
        self.savings = Budget(share / 2)
        # Plain steps that one takes more if none is right, by the number of candidates:
        # those of 1, 2 to 3, 4 to 7 and so on are told apart.
        self._losses: dict[int, RunningMean] = {}
        self._took = RunningMean()  # a drafted step
        self._tokens = RunningMean()  # of a drafted step
        self._last = 1  # of the last one
        self._since = 0  # drafted steps since a plain one was timed
        self._doubt = False  # whether plain steps may take something else by now
        self._untimed: list[DraftedStep] = []  # before any plain step was
        self._proposal = RunningMean()  # seconds of one that isn't a sequence's first
        self._reading = RunningMean(newest=1 / 4)  # seconds a prompt token, of a first
        self._length = RunningMean(newest=1 / 4)  # tokens of an answer
        # Plain steps gained for each token, and the share of sequences that gained; as
        # if three had gained nothing before.
        self._value = RunningMean(count=3, newest=1 / 8)
        self._gaining = RunningMean(count=3, newest=1 / 8)
        self._expected = answer

    def begin(self, room: int) -> None:
        """A sequence begins that may emit up to ``room`` tokens."""
        usual = 2 * self._length.value if self._length.count else self._answer
        self._expected = min(room, int(usual))
        self.allow(0.0)
        # What was lost before says less the more sequences gained.
        least = self._gaining.value * self.budget.most
        self.budget.balance = max(self.budget.balance, least)

    def allow(self, earned: float) -> None:
        """Limit what may be lost, in a sequence that gained so many plain steps."""
        tokens = min(self._length.value, self._expected)
        gains = max(0.0, earned) + max(0.0, self._value.value * tokens)
        most = self.credit + self.share * min(self._expected, self._answer)
        self.budget.limit(most + min(self._kept * gains, self._most_kept))

    def ended(
        self, emitted: int, gained: float, drafted: bool, owed: float = 0.0
    ) -> None:
        """A sequence has ended.

        Args:
            emitted: Its tokens.
            gained: Seconds that drafting gained in it.
            drafted: Whether any time went into drafting.
            owed: Plain steps for its prompt that were not repaid.
        """
        self.savings.pay(owed)
        # The debts of several prompts don't add up, or it would take too long to try
        # again.
        self.savings.balance = max(self.savings.balance, -owed)
        if emitted:
            self._length.add(emitted)
            if drafted and (plain := self.plain.step):
                self._value.add(gained / plain / emitted)
                self._gaining.add(float(gained > 0))

    def went_by(self, seconds: float) -> None:
        """So much time went by, whatever for."""
        if plain := self.plain.step:
            slower = 2 - self._gaining.value if self._failed else 1
            self.budget.passed(seconds / plain, slower)
            self.savings.passed(seconds / plain)

    def checked(self, seconds: float) -> None:
        """So long it took to propose nothing."""
        if plain := self.plain.step:
            self.budget.pay(seconds / plain)

    def invested(self, cost: float, emitted: int) -> float:
        """So many plain steps went into a prompt; those that gains are to repay."""
        if self._coming(emitted) > cost:
            return cost
        # What was saved is no licence to lose many readings one after the other.
        self.savings.limit(self._readings_saved * cost)
        (self.savings if self.savings.affords(cost) else self.budget).pay(cost)
        return 0.0

    def wants(self, emitted: int, reading: float) -> bool:
        """Whether the next step is to draft.

        Args:
            emitted: Tokens of this answer so far.
            reading: Seconds that the proposal takes more than others, for the prompt.
        """
        if self._looks():
            return False
        plain = self.plain.step
        if plain is None:
            return reading == 0
        # What a full budget doesn't afford is tried when it is full.
        if not self._allows(self._fewest) and self.budget.balance < self.budget.most:
            return False
        return reading <= self.spare(emitted)

    def spare(self, emitted: int) -> float:
        """Seconds that may go into the prompt, after so many tokens of the answer.

        As many as the rest of it is expected to gain, or else as may be lost.
        """
        if (plain := self.plain.step) is None:
            return 0.0
        budget = self.budget.balance - self.risk(self._fewest)
        return plain * max(self._coming(emitted), budget, self.savings.balance, 0.0)

    def _coming(self, emitted: int) -> float:
        """Plain steps that what is left of an answer is expected to gain."""
        # An answer longer than usual is thought to be half done.
        left = max(self._length.value - emitted, float(emitted))
        left = max(0.0, min(left, self._expected - emitted))
        return self._value.value * left

    def most_nodes(self, most: int) -> int:
        """How many candidates the next step may verify, of ``most`` otherwise."""
        if self._untimed and self._seems_to_pay():
            return most
        nodes = self._fewest
        while nodes < most and self._allows(min(2 * nodes + 1, most)):
            nodes = 2 * nodes + 1
        return min(nodes, most)

    def risk(self, nodes: int) -> float:
        """Plain steps that verifying so many candidates loses if none is right.

        Sizes not seen are in proportion to the nearest that was.
        """
        if not self._losses:
            return self._candidate * nodes
        size = nodes.bit_length()
        near = min(self._losses, key=lambda other: (abs(other - size), other))
        return self._losses[near].value * float(2.0 ** (size - near))

    def _allows(self, nodes: int) -> bool:
        """Whether so many candidates may be verified."""
        # One failure says little of what gained before.
        return self.budget.affords(self.risk(nodes) * (1 - self._gaining.value))

    def prompt_rows(self, wanted: int, prompt: int, row: float) -> int:
        """How many of a prompt's last positions the drafter is shown.

        Args:
            wanted: By the strategy.
            prompt: Tokens of the prompt.
            row: What showing a position costs, as a share of reading a token.
        """
        wanted = max(1, min(wanted, prompt))
        token, plain = self.plain.prompt_token, self.plain.step
        cost = row * (token / plain if token and plain else self._prompt_token)
        if cost <= 0 or self._coming(0) > cost * (wanted - 1):
            return wanted
        afforded = int(max(0.0, self.budget.balance) / 3 / cost)
        return 1 + min(wanted - 1, afforded)

    def reading(self, prompt: int) -> float:
        """Seconds that a first proposal takes more, for a prompt of so many tokens."""
        if self._reading.count:
            return self._reading.value * prompt
        return prompt * (self.plain.prompt_token or 0.0) / self._faster

    def proposed(self, seconds: float) -> None:
        """A proposal, not a sequence's first, took so long."""
        self._proposal.add_seconds(seconds)

    def read(self, seconds: float, prompt: int, reads: bool) -> float:
        """A sequence's first took so long; what of it was for the prompt, in seconds.

        Before any other was seen it is what was expected of a draft model that reads.
        """
        if self._proposal.count:
            reading = max(0.0, seconds - self._proposal.value)
        else:
            reading = min(seconds, self.reading(prompt)) if reads else 0.0
        self._reading.add(reading / prompt)
        return reading

    def passed(self, seconds: float) -> float:
        """A step without drafts took so long, what was proposed left out.

        Returns:
            Plain steps that drafted steps gained which nothing could be held against.
        """
        self.plain.add_step(seconds)
        self._since, self._doubt = 0, False
        waiting, self._untimed = self._untimed, []
        return sum(self.drafted(step) for step in waiting)

    def drafted(self, step: DraftedStep) -> float:
        """Take in a step with drafts; what it gained, in plain steps."""
        plain = self.plain.step
        if plain is None:
            self._untimed.append(step)
            return 0.0
        took = step.seconds / plain
        # No candidate makes a step faster, so a pause was in the plain ones; or the
        # machine has slowed down, plain steps included.
        usual = 1 + self.risk(step.nodes)
        self._doubt = took < 0.8 or (bool(self._losses) and took > 2.5 * usual)
        took = min(took, self._pause * usual)
        size = step.nodes.bit_length()
        self._losses.setdefault(size, RunningMean()).add(max(0.0, took - 1))
        self._took.add(took)
        self._tokens.add(step.emitted)
        self._last = step.emitted
        self._since += 1
        gain = step.emitted - took
        self._failed = gain <= 0
        self.budget.pay(-gain)
        return gain

    def _seems_to_pay(self) -> bool:
        """Whether steps that nothing could be held against emit many tokens."""
        return mean(step.emitted for step in self._untimed) >= 2.5

    def _looks(self) -> bool:
        """Whether the next step must be plain, to time it.

        Best after a draft that brought nothing. The more drafting gains, the more a
        plain step costs, and the less its exact time matters.
        """
        if self.plain.step is None:
            waiting = len(self._untimed)
            return waiting > 0 and (waiting >= 40 or not self._seems_to_pay())
        if self._doubt:
            return True
        took = max(self._took.value, 1.0)
        lost = 1 - took / max(self._tokens.value, 1.0)
        every = min(max(lost / (self._look_share * took), 16.0), 256.0)
        return self._since >= every * (1 if self._last == 1 else 2)


class Guard(Drafter):
    """A drafter that is asked only while its drafts don't lose too much time.

    The output doesn't depend on it: what is proposed never changes what is emitted, or
    its distribution. Which steps draft depends on measured times, so where drafts are
    sampled two runs of one seed may differ.

    Args:
        inner: Must cope with steps for which it wasn't asked.
        memory: Shared by the sequences of one strategy object.
        clock: Seconds.
        prompt: Tokens of the prompt.
        room: Tokens that may be emitted.
        reads: Whether the first proposal reads the prompt with a draft model.
        row: What showing ``inner`` the logits of a prompt's position costs, as a share
            of reading a token.
    """

    def __init__(
        self,
        inner: Drafter,
        memory: GuardMemory,
        clock: Callable[[], float],
        prompt: int = 1,
        room: int = 200,
        reads: bool = False,
        row: float = 0.0,
    ) -> None:
        self._inner, self._memory, self._clock = inner, memory, clock
        self._prompt, self._reads, self._row = prompt, reads, row
        memory.begin(room)
        self._begun = self._started = clock()
        self._shown = 1
        self._emitted = self._asked = 0
        self._asks = False
        self._proposing = self._reading = 0.0  # seconds of this step
        self._unpaid = 0.0  # seconds for the prompt, before a plain step was timed
        self._owed = 0.0  # plain steps for the prompt, to be repaid by gains
        self._earned = 0.0  # plain steps gained by drafted steps
        self.passed_over = 0  # steps
        self.gained = 0.0  # seconds

    @property
    def plain_step(self) -> float | None:
        """Seconds of a step without drafts; None before any was timed."""
        return self._memory.plain.step

    def prompt_rows(self, wanted: int) -> int:
        """How many of the prompt's last positions ``inner`` is shown, of ``wanted``."""
        self._shown = self._memory.prompt_rows(wanted, self._prompt, self._row)
        return self._shown

    def most_nodes(self, most: int) -> int:
        """How many candidates the next step may verify, of ``most`` otherwise."""
        return self._memory.most_nodes(most)

    def propose(self, context: Context) -> TokenTree:
        """The inner drafter's proposal, or nothing."""
        self._started = self._clock()
        self._proposing = self._reading = 0.0
        first = self._reads and not self._asked
        reading = self._memory.reading(self._prompt) if first else 0.0
        self._asks = self._memory.wants(self._emitted, reading)
        if not self._asks:
            self.passed_over += 1
            return TokenTree.root_only(context.ids[-1])
        # An inner drafter knows itself what it gained by waiting.
        spare = self._memory.spare(0)
        tree = self._inner.propose(replace(context, spare=spare))
        self._proposing = self._clock() - self._started
        return tree

    def observe(self, outcome: Outcome) -> None:
        """Pass it on, and judge the step."""
        before = self._clock()
        self._inner.observe(outcome)
        after = self._clock()
        self._emitted += len(outcome.emitted)
        if outcome.tree is None:
            self._prefilled(before - self._begun, after - before)
            return
        memory = self._memory
        if self._asks:
            self._learn_proposal()
        if len(outcome.tree) > 1:
            nodes, seconds = len(outcome.tree) - 1, after - self._started
            step = DraftedStep(len(outcome.emitted), seconds - self._reading, nodes)
            self._earn(memory.drafted(step))
        else:
            self._earn(memory.passed(before - self._started - self._proposing))
            checking = self._proposing - self._reading + after - before
            self.gained -= checking
            if self._asks:
                memory.checked(checking)
        self._spend(self._reading)
        memory.went_by(after - self._started)

    def close(self) -> None:
        """Pass it on, and remember what the sequence came to."""
        drafted = self._asked > 0 or self._shown > 1
        self._memory.ended(self._emitted, self.gained, drafted, max(0.0, self._owed))
        self._inner.close()

    def _prefilled(self, seconds: float, observing: float) -> None:
        """Reading the prompt took so long, and what it showed so long to take in."""
        unshown = 1 - self._row  # what a position costs that isn't shown
        rows = self._prompt * unshown + self._shown * self._row
        row = self._row * seconds / rows
        shown = (self._shown - 1) * row
        self._memory.plain.add_prompt(seconds - shown, self._prompt)
        self._spend(shown + observing)
        self._memory.went_by(seconds + observing)

    def _learn_proposal(self) -> None:
        """Take in what the proposal took, and what of it was for the prompt."""
        memory = self._memory
        self._asked += 1
        self._reading = self._inner.read_seconds
        if self._asked == 1 and not self._reading:
            self._reading = memory.read(self._proposing, self._prompt, self._reads)
        else:
            memory.proposed(self._proposing - self._reading)

    def _earn(self, gain: float) -> None:
        """Drafted steps gained so many plain steps."""
        if gain:
            self._owed -= max(0.0, gain)
            self._earned += gain
            self._memory.allow(self._earned)
            self.gained += gain * (self._memory.plain.step or 0.0)

    def _spend(self, seconds: float) -> None:
        """So much went into the prompt, for the drafter's sake."""
        self.gained -= seconds
        self._unpaid += seconds
        if plain := self._memory.plain.step:
            cost, self._unpaid = self._unpaid / plain, 0.0
            # A drafter that decides by itself when to read is trusted for once.
            if self._inner.read_seconds:
                self._owed += cost
            else:
                self._owed += self._memory.invested(cost, self._emitted)
