"""Value types of deciding: candidates, the rule's limits, and what is found."""

from __future__ import annotations

from dataclasses import dataclass, field

from adaptspec_tuner.deciding.pooling import Beliefs


@dataclass(frozen=True)
class Candidate:
    """What is known of a setting besides its ratios.

    Args:
        name: For people.
        choosable: False for other engines and for what changed the output.
        baseline: Another engine.
        second_model: Whether it needs a draft model or trained heads.
        memory: Bytes at the highest; None if not measured.
        drafting: Seconds spent in drafting, on whatever all settings were measured on.
    """

    name: str
    choosable: bool = True
    baseline: bool = False
    second_model: bool = False
    memory: int | None = None
    drafting: float = 0.0


@dataclass(frozen=True)
class Found:
    """A setting in a class.

    Args:
        ratio: How many times as fast as plain decoding, corrected for luck: drawn
            toward what the other classes and settings show.
        low: Lower end of the 95% interval of the class's own prompts; None where
            nothing is known of the prompts' spread.
        high: Upper end.
        prompts: How many it was measured on.
        classes: In how many classes.
        faster: Whether it is reliably faster than plain decoding.
    """

    ratio: float
    low: float | None
    high: float | None
    prompts: int
    faster: bool
    classes: int = 1


@dataclass(frozen=True)
class Power:
    """What these prompts can show.

    Args:
        gain: Of which the rest speaks, e.g. 1.15.
        seen: In which part of tunes a setting with this gain in this class alone would
            be found reliably faster.
        prompts: How many of the class it takes to be seen in ``wanted`` of them; None
            where the prompts' spread isn't known.
        wanted: Part of tunes.
    """

    gain: float
    seen: float
    prompts: int | None
    wanted: float


@dataclass(frozen=True)
class Rule:
    """How a choice is made; what the defaults reach is what benchmarks/deciding.py
    prints.

    Args:
        wrong: In which part of tunes, where nothing is faster than plain decoding,
            anything at all is chosen, were the spread of prompts known exactly; as it
            is estimated, it is a little more: 5% are aimed at.
        own: What part of that is for evidence of a class's own prompts; the rest is for
            what the classes show together.
        sure: How likely a setting must be faster in a class, where the classes are
            taken together.
        sure_of_best: The same for settings that are reliably faster over all classes.
        tie: Ratios this close count as equal.
        noise: So do those whose difference is less than so many of its standard
            deviations.
        gain: Of which :class:`Power` speaks; None: it isn't worked out.
        power: The part of tunes that it asks for.
        draws: Tunes without any gain that are drawn to see how far luck goes.
    """

    wrong: float = 0.04
    own: float = 0.9
    sure: float = 0.95
    sure_of_best: float = 0.9
    tie: float = 0.02
    noise: float = 0.5
    gain: float | None = 1.15
    power: float = 0.8
    draws: int = 2000
    beliefs: Beliefs = field(default_factory=Beliefs)
