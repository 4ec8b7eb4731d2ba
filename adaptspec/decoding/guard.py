"""The guard: decides before each step whether to draft, so that drafting loses little.

Each answer has an allowance, a share of what decoding it plainly takes. Whatever is
spent on drafting, the prompt's part included, draws on it; what drafts gain pays it
back. A drafter is asked while the allowance covers what its step may lose. So an answer
never loses much more than the allowance, whatever earlier ones gained, and a drafter
that stopped paying is tried again as the allowance grows.

Tokens per second decide and not the acceptance rate: a draft that is often accepted may
still cost more than it saves. All times are in plain steps, the time that decoding one
token without drafts takes here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median_low
from typing import NamedTuple

from adaptspec.running_mean import RunningMean
from adaptspec.strategy import Context, Drafter, Outcome, reading_from
from adaptspec.token_tree import TokenTree


class PlainTimes:
    """What decoding without drafts takes on one model, in seconds.

    Args:
        costs: Seconds of a forward by its tokens where they are known, else None.
        recent: The middle of so many steps is believed, so that a pause isn't.
    """

    def __init__(
        self,
        costs: Callable[[], Callable[[int], float] | None] = lambda: None,
        recent: int = 5,
    ) -> None:
        self.costs = costs
        self._steps: deque[float] = deque(maxlen=recent)
        self._prompts: deque[float] = deque(maxlen=recent)
        self.step: float | None = None  # of a step; None before any was seen
        self.prompt_token: float | None = None  # of reading one; the same

    @property
    def settled(self) -> bool:
        """Whether steps enough were seen that a slow one among them counts little."""
        return len(self._steps) >= 2

    def add_step(self, seconds: float) -> None:
        """A step without drafts took so long."""
        self._steps.append(seconds)
        self.step = median_low(self._steps)

    def add_prompt(self, seconds: float, tokens: int) -> None:
        """Reading a prompt of ``tokens`` took so long."""
        self._prompts.append(seconds / tokens)
        self.prompt_token = median_low(self._prompts)


class DraftedStep(NamedTuple):
    """A step that verified candidates.

    Args:
        emitted: Tokens.
        seconds: It took, without what is in ``drafting``.
        nodes: Candidates.
        drafting: Seconds of the drafter's own.
    """

    emitted: int
    seconds: float
    nodes: int
    drafting: float = 0.0


class GuardMemory:
    """What is known of one strategy's speed on one engine, across its sequences.

    Args:
        plain: Times without drafts, which all strategies of an engine share.
        credit: Plain steps that an answer may lose, whatever its length.
        share: What it may lose more, of the time that decoding it plainly takes; two
            thirds of it where earlier answers lost.
        most_share: What it may lose in all at most, of that time.
        bet_share: The same where a draft model reads the prompt for it.
        answer: Tokens that an answer is taken to have until answers are known.
        candidate: Plain steps that a candidate is thought to take before any was seen.
        faster: How much faster a draft model reads than the target, before it is seen.
        prompt_token: Plain steps that reading a prompt's token takes, before it is
            seen.
        look_share: Of all time, what may be lost to timing plain steps while drafting
            pays.
        pause: A forward, and what a drafter does in a step, counts as so many plain
            steps more than it may be expected to take, at most: pauses, and what is
            done once, such as timing forwards, say nothing of drafting.
    """

    def __init__(
        self,
        plain: PlainTimes | None = None,
        credit: float = 1.2,
        share: float = 0.0095,
        most_share: float = 0.045,
        bet_share: float = 0.08,
        answer: int = 200,
        candidate: float = 0.25,
        faster: float = 2.0,
        prompt_token: float = 0.125,
        look_share: float = 0.002,
        pause: float = 0.5,
    ) -> None:
        self.plain = plain or PlainTimes()
        self._credit, self._share, self._most_share = credit, share, most_share
        self._answer, self._faster = answer, faster
        self._bet_share = bet_share
        self._candidate, self._prompt_token = candidate, prompt_token
        self._look_share, self._pause = look_share, pause
        # Plain steps that one takes more if none is right, by the number of candidates:
        # those of 1, 2 to 3, 4 to 7 and so on are told apart.
        self._losses: dict[int, RunningMean] = {}
        self._risks: dict[int, float] = {}  # of so many, until more is learnt
        self._took = RunningMean()  # a drafted step
        self._tokens = RunningMean()  # of a drafted step
        self._last = 1  # of the last one
        self._since = 0  # drafted steps since a plain one was timed
        self._doubt = False  # whether plain steps may take something else by now
        # Where little is read: seconds of a proposal, and of each of its candidates.
        self._proposal, self._candidate_seconds = RunningMean(), RunningMean()
        # Seconds of the drafter's own, of a draft model's reading apart, by occasion.
        self._own: dict[str, RunningMean] = {}
        # Of a draft model: their ratio is a token's seconds, long texts count more.
        self._reading_seconds = RunningMean(newest=1 / 4)
        self._reading_tokens = RunningMean(newest=1 / 4)
        self._row = RunningMean(newest=1 / 4)  # seconds a prompt position shown
        self._length = RunningMean(newest=1 / 4)  # tokens of an answer
        # Share of answers that gained; unknown is half-way.
        self._trust = RunningMean(0.5, count=1, newest=1 / 8)

    def promise(self, ratio: float) -> None:
        """It was measured here to be so many times as fast as plain decoding."""
        if ratio > 1 and self._trust.count == 1:
            self._trust.add(1.0)

    def expected(self, room: int) -> int:
        """Tokens of an answer that may have ``room``."""
        usual = self._length.value if self._length.count else self._answer
        return min(room, round(usual))

    def allowed(self, passed: float, whole: float) -> float:
        """Plain steps that an answer may have lost by now.

        A strategy that paid in most answers may lose at once what is allowed in the
        whole answer; one that didn't may lose less.

        Args:
            passed: Plain steps that decoding plainly would have taken so far.
            whole: And to the end.
        """
        trust = self._trust.value
        ahead = max(0.0, 2 * trust - 1) * max(0.0, whole - passed)
        growth = self._share * min(1.0, (1 + trust) / 1.5) * (passed + ahead)
        most = self._most_share * max(passed, whole)
        return min(most, min(2 * trust, 1.0) * self._credit + growth)

    def may_bet(self, whole: float) -> float:
        """Plain steps that an answer may lose where a draft model reads its prompt.

        More than what is allowed otherwise, for a strategy that paid in most answers:
        it can't pay without.
        """
        return self._bet_share * whole if self._trust.value >= 0.75 else 0.0

    def ended(self, emitted: int, gained: float, drafted: bool) -> None:
        """A sequence has ended.

        Args:
            emitted: Its tokens.
            gained: Plain steps that drafting gained in it.
            drafted: Whether any time went into drafting.
        """
        self._risks.clear()
        if emitted:
            self._length.add(emitted)
            if drafted and not -0.25 < gained <= 0:
                self._trust.add(float(gained > 0))

    def risk(self, nodes: int) -> float:
        """Plain steps that verifying so many candidates loses if none is right.

        Sizes not seen are in proportion to the nearest that was; before any was, the
        model's known costs tell.
        """
        if nodes not in self._risks:
            self._risks[nodes] = self._expected_loss(nodes)
        return self._risks[nodes]

    def _expected_loss(self, nodes: int) -> float:
        if not self._losses:
            if costs := self.plain.costs():
                return costs(1 + nodes) / costs(1) - 1
            return self._candidate * nodes
        size = nodes.bit_length()
        near = min(self._losses, key=lambda other: (abs(other - size), other))
        return self._losses[near].value * float(2.0 ** (size - near))

    def most_nodes(self, most: int, left: float) -> int:
        """How many candidates of ``most`` are verified if so much may be lost.

        More than one leave enough for another try, so that a failure isn't the end.
        """
        nodes = 1
        left -= self.risk(1)
        while nodes < most and self.risk(min(2 * nodes + 1, most)) <= left:
            nodes = 2 * nodes + 1
        return min(nodes, most)

    def prompt_token(self) -> float:
        """Plain steps that reading a token of a prompt takes."""
        token, plain = self.plain.prompt_token, self.plain.step
        return token / plain if token and plain else self._prompt_token

    def row(self, share: float) -> float:
        """Plain steps that showing a position of a prompt costs.

        Args:
            share: Of reading a token.
        """
        if self._row.count and (plain := self.plain.step):
            return self._row.value / plain
        return share * self.prompt_token()

    def shown(self, seconds: float, rows: int) -> None:
        """Showing so many positions and learning from them took so long."""
        self._row.add(seconds / rows)

    def reading(self, tokens: int) -> float:
        """Plain steps that a draft model takes to read so many tokens."""
        if self._reading_tokens.count and (plain := self.plain.step):
            each = self._reading_seconds.value / self._reading_tokens.value
            return each * tokens / plain
        return tokens * self.prompt_token() / self._faster

    def own(self, occasion: str, seconds: float) -> float:
        """What of a drafter's own ``seconds`` counts: twice the usual at most.

        Args:
            occasion: What it did; each has an own usual time.
        """
        usual = self._own.get(occasion)
        if usual is None:
            usual = self._own[occasion] = RunningMean()
        most = 2 * usual.value + self._pause * (self.plain.step or math.inf)
        usual.add_seconds(seconds)
        return min(seconds, most)

    def proposed(self, seconds: float, nodes: int) -> None:
        """A proposal of so many candidates that read little took so long."""
        self._proposal.add_seconds(seconds)
        self._candidate_seconds.add_seconds(seconds / max(1, nodes))

    def read(
        self, seconds: float, tokens: int, nodes: int, known: float = 0.0
    ) -> float:
        """A proposal took so long that read ``tokens``; what of it was for them.

        Args:
            known: What the drafter says, 0 if it doesn't.
        """
        # The forward that reads brings the first candidate, too.
        rest = self._candidate_seconds.value * max(0, nodes - 1)
        reading = known or max(0.0, seconds - min(rest, self._proposal.value))
        self._reading_seconds.add(reading)
        self._reading_tokens.add(tokens)
        return reading

    def passed(self, seconds: float) -> None:
        """A step without drafts took so long, what was proposed left out."""
        self.plain.add_step(seconds)
        self._since, self._doubt = 0, False

    def drafted(self, step: DraftedStep) -> float:
        """Take in a step with drafts; what it gained, in plain steps."""
        plain = self.plain.step
        assert plain is not None  # looks() asks for one first
        took = step.seconds / plain
        # No candidate makes a step faster, so a pause was in the plain ones; or the
        # machine has slowed down, plain steps included.
        usual = 1 + self.risk(step.nodes)
        self._doubt = took < 0.8 or (bool(self._losses) and took > 2.5 * usual)
        took = max(1.0, min(took, 2 * usual - 1 + self._pause))
        took += step.drafting / plain
        size = step.nodes.bit_length()
        # What was thought before counts as one step: one that was timed too short
        # mustn't make larger trees look free.
        believed = RunningMean(self.risk(step.nodes), count=1)
        self._losses.setdefault(size, believed).add(took - 1)
        self._risks.clear()
        self._took.add(took)
        self._tokens.add(step.emitted)
        self._last = step.emitted
        self._since += 1
        return step.emitted - took

    def looks(self, losing: bool = False) -> bool:
        """Whether the next step must be plain, to time it.

        Best after a draft that brought nothing. The more drafting gains, the more a
        plain step costs, and the less its exact time matters.

        Args:
            losing: Whether drafts have lost a plain step in this answer and go on so.
        """
        if self._doubt or self.plain.step is None or (losing and self._since >= 8):
            return True
        if not self._since:
            return False
        if self._last == 1 and not self.plain.settled:
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
        reads: Whether proposals read what was committed with a draft model.
        may_read: Whether some may.
        row: What showing ``inner`` the logits of a prompt's position costs, as a share
            of reading a token.
        starting: Seconds that starting ``inner`` took. The first start may time the
            model's forwards, which no later one does.
        kept: What of an answer's gains may be lost again in it, up to ``most_kept``
            plain steps.
        least_read: Fewer of the prompt's tokens aren't worth reading alone.
        least_left: Where fewer tokens are to come, no more is lost for the prompt than
            for anything else.
    """

    def __init__(
        self,
        inner: Drafter,
        memory: GuardMemory,
        clock: Callable[[], float],
        prompt: int = 1,
        room: int = 200,
        reads: bool = False,
        may_read: bool = True,
        row: float = 0.0,
        starting: float = 0.0,
        kept: float = 0.25,
        most_kept: float = 5.0,
        least_read: int = 16,
        least_left: int = 48,
    ) -> None:
        self._inner, self._memory, self._clock = inner, memory, clock
        self._prompt, self._row = prompt, row
        self._reads, self._may_read = reads, may_read
        self._kept, self._most_kept = kept, most_kept
        self._least_read, self._least_left = least_read, least_left
        self._room, self._expected = room, memory.expected(room)
        self._begun = self._started = clock()
        self._prefill = prompt * memory.prompt_token()  # plain steps
        self._shown = 1
        self._emitted = self._asked = 0
        self._first = 0  # token from which on the draft model has read
        self._have = 0  # tokens up to which it has
        self._asks = self._losing = False
        self._proposing = self._reading = 0.0  # seconds of this step
        # Seconds, before a plain step was timed.
        self._starting, self._unpaid = starting, 0.0
        self._net = self._best = 0.0  # plain steps gained, and the most so far
        self._bet = 0.0  # plain steps that may be lost more, for the prompt's reading
        self.passed_over = 0  # steps
        self.gained = 0.0  # seconds

    def left(self) -> float:
        """Plain steps that may be lost now."""
        passed = self._prefill + self._emitted
        allowed = self._memory.allowed(passed, self._prefill + self._expected)
        kept = min(self._kept * self._best, self._most_kept)
        return allowed + self._bet + kept - (self._best - self._net)

    @property
    def plain_step(self) -> float | None:
        """Seconds of a step without drafts; None before any was timed."""
        return self._memory.plain.step

    def prompt_rows(self, wanted: int) -> int:
        """How many of the prompt's last positions ``inner`` is shown, of ``wanted``.

        They may cost half of what may be lost, so that something is left to draft with.
        """
        wanted = max(1, min(wanted, self._prompt))
        row = self._memory.row(self._row)
        afforded = self.left() / 2 / row if row else wanted
        self._shown = 1 + min(wanted - 1, max(0, int(afforded)))
        return self._shown

    def propose(self, context: Context) -> TokenTree:
        """The inner drafter's proposal, or nothing.

        Lowers ``max_nodes`` of the context to what the step may verify, and says how
        much is ``readable``.
        """
        self._proposing = self._reading = 0.0
        memory, left = self._memory, self.left()
        spare = left - memory.risk(1)
        self._asks = spare >= 0 and not memory.looks(self._losing)
        if self._asks and self._may_read:
            tokens = len(context.ids)
            context.readable = self._readable(tokens, spare)
            if self._reads:
                least = min(self._least_read, tokens - self._have)
                self._asks = context.readable >= least
        if not self._asks:
            self.passed_over += 1
            self._started = self._clock()
            return TokenTree.root_only(context.ids[-1])
        context.max_nodes = memory.most_nodes(context.max_nodes, left)
        self._started = self._clock()
        tree = self._inner.propose(context)
        self._proposing = self._clock() - self._started
        self._asked += 1
        if self._may_read or self._inner.read_seconds:
            self._learn_proposal(context, len(tree) - 1)
        return tree

    def _readable(self, tokens: int, spare: float) -> int:
        """How many of so many tokens a draft model may read in this step.

        All where it is repaid if a draft gains a quarter of a plain step; or else as
        many as half of what may be lost pays for.
        """
        memory = self._memory
        cost = memory.reading(1)
        # An answer longer than usual is thought to be half done.
        left = self._expected - self._emitted
        left = left if left > 0 else min(self._emitted, self._room - self._emitted)
        whole, end = cost * tokens, self._prefill + self._expected
        if whole <= left / 4:
            if whole <= spare:
                return tokens
            if self._reads and not self._have and left >= self._least_left:
                bet = whole - spare + memory.risk(1)  # two tries beside it
                if memory.allowed(end, end) + bet <= memory.may_bet(end):
                    self._bet = bet
                    return tokens
        most = int(spare / cost) if cost else tokens
        goes_on = self._have and tokens - self._have <= most
        return min(most if goes_on else most // 2, tokens - 1)

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
        own = self._proposing - self._reading + after - before
        if not self._reads:  # a draft model's first long chains are no pauses
            own = memory.own("asked" if self._asks else "passed over", own)
        if self._asks:
            self._have += len(outcome.emitted) - 1  # it drafted them itself
        nodes = len(outcome.tree) - 1
        if nodes > outcome.forced:
            # Without the drafter, what a grammar forced would have been accepted, too.
            free = sum(0 < node <= outcome.forced for node in outcome.path)
            step = DraftedStep(
                emitted=len(outcome.emitted) - free,
                seconds=before - self._started - self._proposing,
                nodes=nodes - outcome.forced,
                drafting=own,
            )
            self._earn(memory.drafted(step))
            self._spend(self._reading)
            self._losing = step.emitted == 1 and self._net < -1
        else:
            if not nodes:  # a forced chain alone is no plain step
                memory.passed(before - self._started - self._proposing)
            if self._asks:
                self._spend(self._reading + own)
            else:  # to watch costs as much if it is never asked again
                self.gained -= own

    def close(self) -> None:
        """Pass it on, and remember what the sequence came to."""
        drafted = self._asked > 0 or self._shown > 1
        self._memory.ended(self._emitted, self._net, drafted)
        self._inner.close()

    def _prefilled(self, seconds: float, observing: float) -> None:
        """Reading the prompt took so long, and what it showed so long to take in."""
        memory = self._memory
        unshown = 1 - self._row  # what a position costs that isn't shown
        rows = self._prompt * unshown + self._shown * self._row
        shown = (self._shown - 1) * self._row * seconds / rows
        memory.plain.add_prompt(seconds - shown, self._prompt)
        if self._shown > 1:
            memory.shown(shown + observing, self._shown - 1)
        self._prefill = self._prompt * memory.prompt_token()
        if not self._reads:
            observing = memory.own("prompt", observing)
        self._spend(shown + observing)

    def _learn_proposal(self, context: Context, nodes: int) -> None:
        """Take in what the proposal took, and what of it was for reading."""
        memory, known = self._memory, self._inner.read_seconds
        tokens = len(context.ids)
        readable = tokens if context.readable is None else context.readable
        read = min(tokens, readable) if known else 0
        if self._reads:
            first = reading_from(self._first, self._have, tokens, readable)
            read = tokens - (self._have if first == self._first else first)
            self._first, self._have = first, tokens
        if known or read >= self._least_read:
            self._reading = memory.read(self._proposing, read, nodes, known)
        else:
            memory.proposed(self._proposing, nodes)

    def _earn(self, gain: float) -> None:
        """So many plain steps were gained, or lost if negative."""
        self._net += gain
        self._best = max(self._best, self._net)
        self.gained += gain * (self._memory.plain.step or 0.0)

    def _spend(self, seconds: float) -> None:
        """So many seconds went into drafting beside a drafted step."""
        self._unpaid += seconds
        if plain := self._memory.plain.step:
            if self._starting:
                self._unpaid += self._memory.own("start", self._starting)
                self._starting = 0.0
            cost, self._unpaid = self._unpaid / plain, 0.0
            self._earn(-cost)
