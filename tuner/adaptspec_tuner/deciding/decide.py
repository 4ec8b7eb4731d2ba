"""Chooses a setting for each class and for all classes, with the reason in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaptspec.profile import EVERY_CLASS
from adaptspec_tuner.deciding.evidence import Ratios, gathered
from adaptspec_tuner.deciding.pooled import Pooled
from adaptspec_tuner.deciding.rule import Candidate, Found, Power, Rule


@dataclass(frozen=True)
class Decided:
    """The choice for a class.

    Args:
        picks: Keys of the settings that are reliably faster with the reason to take
            each, the best first; without any it is plain decoding.
        plain: Why plain decoding, where none of these can be used.
        found: Setting key -> what it is worth.
        prompts: On how many it rests.
        power: What these prompts can show, where nothing was found faster; None where
            nothing is known of their spread.
    """

    prompt_class: str
    picks: Sequence[tuple[str, str]]
    plain: str
    found: Mapping[str, Found]
    prompts: int
    power: Power | None = None

    @property
    def chosen(self) -> str | None:
        """The best setting; None for plain decoding."""
        return self.picks[0][0] if self.picks else None

    @property
    def reason(self) -> str:
        """Why that."""
        return self.picks[0][1] if self.picks else self.plain


def decide(
    ratios: Ratios,
    candidates: Mapping[str, Candidate],
    *,
    rule: Rule | None = None,
    how: str = "measured",
    measure: str = "",
    seed: int = 0,
) -> dict[str, Decided]:
    """The choice for each class, and under ``EVERY_CLASS`` for all in equal parts.

    The interval is a t interval of the class's own prompts in logarithms, with a spread
    that the classes lend each other (:func:`~.spread.moderated`). The ratio is that of
    :class:`~.pooling.Pooling`, moved to the interval's end where it lies outside
    (Efron and Morris, "Limiting the risk of Bayes and empirical Bayes estimators",
    1972).

    A setting is reliably faster where it beats what luck brings: tunes with the same
    prompts and no gain are drawn, and in ``rule.wrong`` of them the luckiest setting of
    any class is as good. Its own prompts may show it, or all classes together. What is
    reliably faster over all classes may be taken in a class where it is likely to be.

    Args:
        ratios: Class -> setting key -> prompt id -> ratio per repeat, plain decoding
            left out.
        candidates: Setting key -> what else is known of it.
        how: Under which controls, as it begins a reason: "measured greedily".
        measure: What the ratios are of, as it follows "2.00x plain decoding".
    """
    rule = rule or Rule()
    ours = _of(ratios, candidates, baselines=False)
    theirs = _of(ratios, candidates, baselines=True)
    pooled = Pooled(gathered(ours), candidates, rule, seed)
    alone = Pooled(gathered(theirs), candidates, rule, seed)
    words = _Words(candidates, how, measure, rule, list(ratios))
    over_all = _decided(EVERY_CLASS, pooled, alone, candidates, rule, words)
    decided = {
        name: _decided(name, pooled, alone, candidates, rule, words, over_all.picks)
        for name in ratios
    }
    return {**decided, EVERY_CLASS: over_all}


def _of(ratios: Ratios, candidates: Mapping[str, Candidate], baselines: bool) -> Ratios:
    return {
        name: {k: v for k, v in found.items() if candidates[k].baseline == baselines}
        for name, found in ratios.items()
    }


def _decided(
    name: str,
    pooled: Pooled,
    alone: Pooled,
    candidates: Mapping[str, Candidate],
    rule: Rule,
    words: _Words,
    over_all: Sequence[tuple[str, str]] = (),
) -> Decided:
    found = pooled.found(name)
    others = alone.found(name, corrected=False)
    faster = {key for key, of in found.items() if of.faster}
    borrowed = {
        key
        for key, _ in over_all
        if key in found.keys() - faster
        and pooled.likely(name, key) >= rule.sure_of_best
    }
    picks: list[tuple[str, str]] = []
    left = faster | borrowed
    unsure = {
        key: of.ratio
        for key, of in found.items()
        if candidates[key].choosable and key not in left
    }
    while left:
        best = max(left, key=lambda key: (found[key].ratio, key))
        tied = [
            key
            for key in left
            if found[key].ratio >= found[best].ratio * (1 - rule.tie)
            or pooled.apart(name, best, key) < rule.noise
        ]
        chosen = min(
            tied, key=lambda key: _cheapest_first(key, candidates, found, tied)
        )
        left.remove(chosen)
        reason = words.chosen(
            *(name, chosen, best, found, others, chosen in borrowed),
            unsure=_higher(found[chosen].ratio * (1 + rule.tie), unsure),
        )
        picks.append((chosen, reason))
    power = None if picks else pooled.power(name)
    every = {**found, **others}
    return Decided(
        prompt_class=name,
        picks=picks,
        plain=words.plain(name, found, others, power, bool(picks)),
        found=every,
        prompts=min((of.prompts for of in every.values()), default=0),
        power=power,
    )


def _higher(ratio: float, others: Mapping[str, float]) -> str | None:
    """The key of the highest that is above ``ratio``."""
    key = max(others, key=lambda key: (others[key], key), default=None)
    return None if key is None or others[key] <= ratio else key


def _cheapest_first(
    key: str,
    candidates: Mapping[str, Candidate],
    found: Mapping[str, Found],
    tied: Sequence[str],
) -> tuple[bool, float, float, float, str]:
    """A total order, so that the order of settings doesn't matter."""
    known = [m for k in tied if (m := candidates[k].memory) is not None]
    memory = candidates[key].memory
    # Less than a hundredth more is what allocators differ by.
    steps = 0.0
    if memory is not None and min(known) > 0:
        steps = math.floor(100 * (memory / min(known) - 1))
    return (
        candidates[key].second_model,
        steps,
        candidates[key].drafting,
        -found[key].ratio,
        key,
    )


class _Words:
    """Reasons for people."""

    def __init__(
        self,
        candidates: Mapping[str, Candidate],
        how: str,
        measure: str,
        rule: Rule,
        classes: Sequence[str],
    ) -> None:
        self._candidates, self._measure, self._rule = candidates, measure, rule
        self._how = how
        self._classes = classes

    def chosen(
        self,
        name: str,
        chosen: str,
        best: str,
        found: Mapping[str, Found],
        others: Mapping[str, Found],
        borrowed: bool,
        unsure: str | None,
    ) -> str:
        of = found[chosen]
        reason = (
            f"{self._how}, {of.ratio:.2f}x plain decoding{self._measure} on "
            f"{self._where(name, of.classes)} ({_interval(of)})"
        )
        if borrowed:
            reason += "; its own prompts don't tell for sure, all classes together do"
        if unsure is not None:
            known = f"{self._candidates[unsure].name} ({found[unsure].ratio:.2f}x)"
            reason += f"; {known} isn't sure enough"
        if chosen != best:
            other = f"{self._candidates[best].name} ({found[best].ratio:.2f}x)"
            reason += f"; {other} is as fast within noise and costs more"
        return reason + self._faster_engine(others, of.ratio)

    def plain(
        self,
        name: str,
        found: Mapping[str, Found],
        others: Mapping[str, Found],
        power: Power | None,
        others_chosen: bool,
    ) -> str:
        own = {k: f for k, f in found.items() if self._candidates[k].choosable}
        if not own:
            reason = f"nothing else was measured on {self._where(name)}"
            return reason + self._faster_engine(others, 1.0)
        if others_chosen:
            return f"nothing else is reliably faster on {self._where(name)}"
        best = max(own, key=lambda key: (own[key].ratio, key))
        of = own[best]
        reason = (
            f"nothing is reliably faster{self._measure} on "
            f"{self._where(name)}; best: {self._candidates[best].name} "
            f"{of.ratio:.2f}x ({_interval(of)})"
        )
        if power is None:
            reason += "; one prompt has no spread, give two or more"
        elif power.prompts is not None and power.seen < power.wanted:
            where = " of each class" if name == EVERY_CLASS else ""
            reason += (
                f"; a gain of {power.gain:.2f}x would be seen in {power.seen:.0%} of "
                f"tunes with these prompts, in {power.wanted:.0%} with about "
                f"{power.prompts}{where}"
            )
        return reason + self._faster_engine(others, 1.0)

    def _where(self, name: str, measured: int | None = None) -> str:
        if name != EVERY_CLASS:
            return repr(name)
        count = len(self._classes)
        if count == 1:
            return repr(self._classes[0])
        if measured is None or measured == count:
            return "all classes"
        return f"{measured} of {count} classes"

    def _faster_engine(self, others: Mapping[str, Found], ours: float) -> str:
        faster = {
            key: of
            for key, of in others.items()
            if of.ratio > ours * (1 + self._rule.tie)
        }
        if not faster:
            return ""
        key = max(faster, key=lambda key: (faster[key].ratio, key))
        return (
            f"; another engine is faster: {self._candidates[key].name} "
            f"{faster[key].ratio:.2f}x ({_interval(faster[key])})"
        )


def _interval(found: Found) -> str:
    many = f"{found.prompts} prompt{'' if found.prompts == 1 else 's'}"
    if found.low is None or found.high is None:
        return many
    return f"95% interval {found.low:.2f}-{found.high:.2f}, {many}"
