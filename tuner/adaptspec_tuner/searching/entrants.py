"""Selects the settings of most promise, which open the race of a class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptspec.errors import AdaptSpecError
from adaptspec.params import Scalar
from adaptspec.profile import EVERY_CLASS, Environment, Profile
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.searching.space import defaults

if TYPE_CHECKING:
    from adaptspec_tuner.replaying.presearch import Presearch
    from adaptspec_tuner.searching.space import Searched

Params = Mapping[str, Scalar]


@dataclass(frozen=True)
class Entrants:
    """A strategy's settings for a class, the most promising first.

    Args:
        settings: All that are to be tried before the search has ideas of its own.
        count: How many of them open the race.
        predicted: Setting key -> prompt id -> the ratio to plain decoding that the
            replay promised.
    """

    settings: Sequence[Params]
    count: int
    predicted: Mapping[str, Mapping[str, float]]


def common_settings(
    strategies: Iterable[Searched], replayed: Presearch | None
) -> dict[str, Params]:
    """Strategy -> its setting for all classes: the replay's, else its defaults.

    It opens the race in every class, so that strategies can be compared over all.

    Args:
        replayed: Trials of the class :data:`EVERY_CLASS`.
    """
    found: dict[str, Params] = {}
    for cls in strategies:
        ranked = replayed.ranked(EVERY_CLASS, cls.name) if replayed else []
        found[cls.name] = dict(ranked[0].params) if ranked else defaults(cls.Params)
    return found


def entrants(
    cls: Searched,
    prompt_class: str,
    common: Params,
    replayed: Presearch | None,
    earlier: Sequence[Params] = (),
    *,
    worth: float = 1.03,
    held: int = 2,
) -> Entrants:
    """What a strategy opens a class's race with.

    Its common setting, and one of the class's own where the replay promises clearly
    more, or an earlier run chose it.

    Args:
        earlier: Settings of earlier runs for this class, best first.
        worth: How much more one of its own must promise.
        held: Settings of the replay that are tried early in any case.
    """
    ranked = replayed.ranked(prompt_class, cls.name) if replayed else []
    promised = {
        Setting(cls.name, t.params).key: float(t.detail["ratio"]) for t in ranked
    }
    own = [dict(t.params) for t in ranked[:held] if dict(t.params) != dict(common)]
    least = worth * promised.get(Setting(cls.name, common).key, 0.0)
    better = bool(own) and promised[Setting(cls.name, own[0]).key] >= least
    known = [p for p in map(dict, earlier[:1]) if p != dict(common)]
    order = [dict(common), *(own[:1] if better else []), *known]
    opening: list[Params] = []
    for params in order:
        if params not in opening:
            opening.append(params)
    rest = [params for params in own if params not in opening]
    predicted = {
        Setting(cls.name, t.params).key: dict(
            zip(t.detail["prompts"], t.detail["ratios"], strict=True)
        )
        for t in ranked
    }
    return Entrants([*opening, *rest], len(opening), predicted)


def earlier_settings(
    profiles: Iterable[Profile],
    environment: Environment,
    strategies: Sequence[Searched],
) -> dict[tuple[str, str], list[Params]]:
    """Settings that earlier runs confirmed for the same model, best first.

    Those of this environment stand before those of a like one: another machine or
    another dtype with the same weights.

    Returns:
        By class and strategy; without parameters that the strategy no longer takes.
    """
    spaces = {cls.name: cls.Params for cls in strategies}
    ours = environment.key()
    known = [
        p
        for p in profiles
        if p.strategy in spaces
        and not p.baseline
        and p.lossless
        and p.environment.engine == environment.engine
        and p.environment.model == environment.model
    ]
    known.sort(key=lambda p: (p.environment.key() != ours, -p.measurement.ratio))
    found: dict[tuple[str, str], list[Params]] = {}
    for profile in known:
        try:
            space = spaces[profile.strategy]
            params = space.parse(dict(profile.params), profile.strategy).model_dump()
        except AdaptSpecError:
            continue
        settings = found.setdefault((profile.prompt_class, profile.strategy), [])
        if params not in settings:
            settings.append(params)
    return found
