"""Chooses among settings that were tuned, by what requests with them take.

A bandit of Thompson's kind: of each setting a speed is drawn that may be the true one,
and the fastest decodes (Thompson, "On the likelihood that one unknown probability
exceeds another in view of the evidence of two samples", 1933). Its context is the
prompt's class, its prior what was tuned. What was seen fades with every request of the
class, so that a change is followed and what was given up is tried again (Raj and
Kalyani, "Taming non-stationary bandits: a Bayesian approach", 2017).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from adaptspec.choosing.belief import Belief, moved_by, shift, tuned_belief
from adaptspec.choosing.words import learnt
from adaptspec.decoding.stats import RunStats
from adaptspec.errors import AdaptSpecError
from adaptspec.in_use import Uses, ratio_of, use_of
from adaptspec.profile import ANSWER, EVERY_CLASS, Use
from adaptspec.selector import Choice, Ranking


@dataclass(frozen=True)
class Learning:
    """How the choice follows what requests take.

    Args:
        memory: What was seen fades by a factor e over so many requests of a class;
            infinity: nothing is forgotten.
        exploration: How far speeds are drawn from what is expected: 1 as far as they
            are uncertain, 0 always takes the setting that is expected to be fastest.
        moved: How far a setting's ratio in use is from the tuned one: standard
            deviation of the logarithm. The larger, the less a profile counts.
        shared: How far all settings of a class together are from what was tuned, as
            where prompts are of another kind. The larger, the more a request with one
            tells of the others.
        outlier: A request counts as so many standard deviations off at most.
        tokens: A shorter answer counts in proportion as less than a request.
        seed: Of what is drawn; None: differs from process to process.

    Raises:
        AdaptSpecError: for a value that can't be.
    """

    memory: float = 100.0
    exploration: float = 0.35
    moved: float = 0.15
    shared: float = 0.15
    outlier: float = 3.0
    tokens: int = 32
    seed: int | None = None

    def __post_init__(self) -> None:
        least = {"memory": 1, "exploration": 0, "moved": 0.01, "shared": 0}
        for name, lowest in {**least, "outlier": 1, "tokens": 1}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise AdaptSpecError(
                    f"{name} of Learning must be a number, got {value!r}; leave it out "
                    "for the usual one"
                )
            endless = name != "memory" and math.isinf(value)
            if not value >= lowest or endless:
                what = f"at least {lowest}{'' if name == 'memory' else ' and finite'}"
                raise AdaptSpecError(
                    f"{name} of Learning must be {what}, got {value!r}"
                )

    @property
    def kept(self) -> float:
        """What of the weight of what was seen a request of the class leaves."""
        return math.exp(-1 / self.memory)


@dataclass(frozen=True)
class Finalists:
    """What a class's prompts may be decoded with.

    Args:
        ranking: As tuned.
        profiles: Of each choice of the ranking its profile's id; None: it has none, and
            what requests take with it isn't added up.
    """

    ranking: Ranking
    profiles: Sequence[int | None]

    def tuned(self, moved: float) -> list[Belief]:
        """What the tune makes believe of each choice but the last, plain decoding.

        What it couldn't tell to be faster is believed to be as fast.

        Args:
            moved: As of :class:`Learning`.
        """
        decided = self.ranking.decided
        prompts = 0 if decided is None else decided.prompts
        found = [
            tuned_belief(pick, prompts, moved=moved) for pick in self.ranking.picks
        ]
        if self.ranking.unsure:
            return [replace(belief, mean=0.0) for belief in found]
        return found


class Chooser:
    """Chooses for each request, and takes in what it took. Threads may share one.

    All that it knows is in ``uses``.
    """

    def __init__(self, uses: Uses, learning: Learning) -> None:
        self._uses, self._learning = uses, learning
        self._random = Random(learning.seed)

    def choose(self, finalists: Finalists) -> int:
        """The place of the choice that decodes the next request."""
        place = fastest(self._drawn(finalists))
        # Plain decoding is known already: trying it would show nothing.
        is_plain = place == len(finalists.ranking.picks)
        return self.best(finalists) if is_plain else place

    def best(self, finalists: Finalists) -> int:
        """The place of the choice that is expected to be fastest."""
        return fastest([belief.mean for belief in self.beliefs(finalists)])

    def beliefs(
        self, finalists: Finalists, random: Random | None = None
    ) -> list[Belief]:
        """Of each choice but the last, plain decoding, whose log ratio is 0.

        Args:
            random: Draws what all of them are off the tuned ratios by; None: as much as
                is expected.
        """
        seen = self.seen(finalists)
        tuned = finalists.tuned(self._learning.moved)
        mean, deviation = shift(tuned, seen, self._learning.shared)
        if random is not None:
            how_far = self._learning.exploration
            mean += how_far * random.normalvariate(0, deviation)
        return [
            moved_by(belief, mean).given(use)
            for belief, use in zip(tuned, seen, strict=False)
        ]

    def seen(self, finalists: Finalists) -> list[Use | None]:
        """Of each choice the sums of what requests took."""
        name = _class(finalists)
        return [
            None if profile is None else self._uses.total(profile, name)
            for profile in finalists.profiles
        ]

    def explained(self, finalists: Finalists, place: int) -> Choice:
        """The choice at ``place``, with what was learnt in its reason."""
        ranking, seen = finalists.ranking, self.seen(finalists)
        said = learnt(ranking, seen, place, self.best(finalists))
        choice = ranking.choices[place]
        return replace(choice, reason="; ".join(filter(None, [choice.reason, said])))

    def add(self, finalists: Finalists, place: int, stats: RunStats) -> None:
        """Take in what a request took that the choice at ``place`` decoded."""
        name, profile = _class(finalists), finalists.profiles[place]
        use = use_of(profile or 0, name, stats)
        if use is None:
            return
        belief = [*self.beliefs(finalists), None][place]
        ratio = ratio_of(stats, _objective(finalists))
        if belief is not None:
            use = self._weighed(use, belief, ratio)
        if ratio is not None:  # else nothing is learnt, and nothing forgotten
            known = [other for other in finalists.profiles if other is not None]
            self._uses.fade(known, name, self._learning.kept)
        if profile is not None:
            self._uses.add(use)

    def _drawn(self, finalists: Finalists) -> list[float]:
        """Of each setting a mean log ratio that may be the true one."""
        how_far = self._learning.exploration
        if not how_far:
            return [belief.mean for belief in self.beliefs(finalists)]
        return [
            belief.mean + how_far * (belief.draw(self._random) - belief.mean)
            for belief in self.beliefs(finalists, self._random)
        ]

    def _weighed(self, use: Use, belief: Belief, ratio: float | None) -> Use:
        """With what the request tells of its setting's speed, outliers moved in."""
        if ratio is None:
            return use
        most = self._learning.outlier * belief.spread
        log = belief.mean + min(max(math.log(ratio) - belief.mean, -most), most)
        weight = min(1.0, use.tokens / self._learning.tokens)
        return replace(
            use,
            log_ratio=weight * log,
            log_ratio_squared=weight * log * log,
            weight=weight,
        )


def fastest(logs: Sequence[float]) -> int:
    """The place of the highest log ratio; that behind the last if none is above 0."""
    best = max(range(len(logs)), key=logs.__getitem__, default=0)
    return best if logs and logs[best] > 0 else len(logs)


def _class(finalists: Finalists) -> str:
    return finalists.ranking.choices[0].prompt_class or EVERY_CLASS


def _objective(finalists: Finalists) -> str:
    decided = finalists.ranking.decided
    return ANSWER if decided is None else decided.objective
