"""The search over another engine's settings: each is started once for several classes.

For engines whose settings can't be predicted: an answer is all that there is to learn
from, and a start is paid whichever class it is for. So every method is asked in every
class first, then new settings are, each in the classes in which it is expected to bring
more than it takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from adaptspec.engines.inference_engine import Method
from adaptspec.params import Scalar
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.searching.expected import Expected, Point, improvement
from adaptspec_tuner.searching.moves import moves
from adaptspec_tuner.searching.search import Search
from adaptspec_tuner.searching.space import defaults

if TYPE_CHECKING:
    from adaptspec.workloads import Prompt
    from adaptspec_tuner.searching.space import Searched

Params = Mapping[str, Scalar]
LEAST_LOG = math.log(0.3)  # whatever is slower is as good as that slow


@dataclass(frozen=True)
class Costs:
    """What measuring takes.

    Args:
        seconds: Class -> what one of its answers takes, plainly decoded.
        starting: Seconds until a setting is ready, as far as is known.
        at_once: Settings that are measured beside the same plain answers.
    """

    seconds: Mapping[str, float]
    starting: Callable[[], float] = lambda: 0.0
    at_once: int = 3

    @property
    def of_setting(self) -> float:
        """Seconds in which one is started and asked in every class, as is plain
        decoding beside it."""
        return self.starting() + 2 * sum(self.seconds.values())

    def fitting(
        self, wanted: Mapping[str, Sequence[Setting]], left: float
    ) -> dict[str, Sequence[Setting]]:
        """The classes that there is time for, with their settings."""
        found: dict[str, Sequence[Setting]] = {}
        for name, settings in wanted.items():
            tried = {
                s.key for s in (*settings, *(s for of in found.values() for s in of))
            }
            answers = sum(self.seconds[n] * (1 + len(of)) for n, of in found.items())
            answers += self.seconds[name] * (1 + len(settings))
            if len(tried) * self.starting() + answers <= left:
                found[name] = settings
        return found


def ask_each(
    search: Search,
    methods: Sequence[Searched],
    prompts: Mapping[str, Sequence[Prompt]],
    costs: Costs,
) -> None:
    """Ask every method in every class with the setting it begins with.

    Args:
        prompts: Class -> its tuning prompts.
    """
    first = {m.name: first_setting(m) for m in methods}
    names = in_order(prompts, costs)
    for name, method in itertools.product(names, methods):
        search.add(name, method, prompts[name], [first[method.name]])
    for some in batches(methods, costs.at_once):
        search.sweep(
            {
                name: [Setting(m.name, dict(first[m.name])) for m in some]
                for name in names
            }
        )


def sweep_all(
    search: Search,
    methods: Sequence[Searched],
    names: Iterable[str],
    costs: Costs,
    left: Callable[[], float],
    *,
    earlier: Mapping[tuple[str, str], Sequence[Params]],
) -> dict[str, Params]:
    """Try settings of earlier runs, then new ones, while there is time.

    Every method was asked before, by :func:`ask_each`.

    Args:
        names: Of the classes.
        left: Seconds until the search ends; may be infinite, and is 0 at its end.
        earlier: Class and method -> settings of earlier runs, best first.

    Returns:
        Method -> its best setting of those that were measured in all classes.
    """
    names = in_order(names, costs)
    again = {
        name: [
            Setting(m.name, dict(known))
            for m in methods
            for known in earlier.get((name, m.name), ())[:1]
        ]
        for name in names
    }
    if any(again.values()):
        search.sweep(again)
    while (seconds := left()) > 0:
        wanted = costs.fitting(promising(search, methods, names, costs), seconds)
        if not wanted or not search.sweep(wanted):
            break
    return {m.name: common_setting(search, m, names, first_setting(m)) for m in methods}


def in_order(names: Iterable[str], costs: Costs) -> list[str]:
    """The classes, those whose answers take least first."""
    return sorted(names, key=lambda name: costs.seconds.get(name, 0.0))


def first_setting(method: Searched) -> Params:
    """What a method is asked with first: its defaults, or what it names."""
    named = method.opening if isinstance(method, Method) else {}
    return {**defaults(method.Params), **named}


def batches(methods: Sequence[Searched], most: int) -> Iterator[Sequence[Searched]]:
    """As few parts as can be, in their order."""
    for start in range(0, len(methods), most):
        yield methods[start : start + most]


def promising(
    search: Search,
    methods: Sequence[Searched],
    names: Sequence[str],
    costs: Costs,
) -> dict[str, list[Setting]]:
    """New settings that bring most for their time, by the class in which they do.

    They are one step away from a method's best setting of a class, in one parameter.
    """
    known = {name: search.logs(name) for name in names}
    points = [
        Point(name, (setting := Setting.from_key(key)).strategy, setting.params, prompt)
        for name, of in known.items()
        for key, by_prompt in of.items()
        for prompt in by_prompt
    ]
    logs = [
        max(LEAST_LOG, log)
        for of in known.values()
        for by_prompt in of.values()
        for log in by_prompt.values()
    ]
    spaces = {m.name: m.Params for m in methods}
    expected = Expected(spaces, points, logs)
    best = {name: 0.0 for name in names}  # plain decoding's
    leaders: dict[str, dict[str, Setting]] = {m.name: {} for m in methods}
    for name, of in known.items():
        settings = [Setting.from_key(key) for key in of]
        if not settings:
            continue
        means, _ = expected.at([Point(name, s.strategy, s.params) for s in settings])
        for at in np.argsort(-means):
            best[name] = max(best[name], float(means[at]))
            leaders[settings[at].strategy].setdefault(name, settings[at])
    open_to = {
        (name, m.name)
        for name in names
        for m in methods
        if search.open_to(name, m.name)
    }
    candidates: dict[str, Setting] = {}
    for method in methods:
        for start in leaders[method.name].values():
            for _, _, params in moves(method.Params, start.params):
                setting = Setting(method.name, params)
                candidates.setdefault(setting.key, setting)
    chosen: dict[str, list[Setting]] = {}
    for _ in range(costs.at_once):
        picked = _best_of(candidates, expected, best, known, open_to, costs)
        if picked is None:
            break
        setting, classes = picked
        del candidates[setting.key]
        for name in classes:
            chosen.setdefault(name, []).append(setting)
        expected = expected.believing(
            [Point(n, setting.strategy, setting.params) for n in classes]
        )
    return {name: chosen[name] for name in names if name in chosen}


def _best_of(
    candidates: Mapping[str, Setting],
    expected: Expected,
    best: Mapping[str, float],
    known: Mapping[str, Mapping[str, object]],
    open_to: set[tuple[str, str]],
    costs: Costs,
) -> tuple[Setting, list[str]] | None:
    """The setting that brings most for its time, and in which classes."""
    settings = list(candidates.values())
    names = list(best)
    gains = np.zeros((len(settings), len(names)))
    for column, name in enumerate(names):
        means, spreads = expected.at(
            [Point(name, s.strategy, s.params) for s in settings]
        )
        gains[:, column] = improvement(means, spreads, best[name])
        for row, setting in enumerate(settings):
            if setting.key in known[name] or (name, setting.strategy) not in open_to:
                gains[row, column] = 0.0
    starting = costs.starting()
    picked: tuple[float, Setting, list[str]] | None = None
    for row, setting in enumerate(settings):
        value, classes = _worth(
            dict(zip(names, gains[row], strict=True)), costs, starting
        )
        if classes and (picked is None or value > picked[0]):
            picked = value, setting, classes
    return None if picked is None else (picked[1], picked[2])


def _worth(
    gains: Mapping[str, float], costs: Costs, starting: float
) -> tuple[float, list[str]]:
    """What a setting brings for a second, in the classes in which that is most."""

    def seconds(name: str) -> float:
        return max(1e-3, costs.seconds.get(name, 0.0) * (1 + 1 / costs.at_once))

    ranked = sorted(
        (name for name in gains if gains[name] > 0),
        key=lambda name: -gains[name] / seconds(name),
    )
    best, count = 0.0, 0
    gained, taken = 0.0, starting
    for number, name in enumerate(ranked, 1):
        gained, taken = gained + gains[name], taken + seconds(name)
        if gained / taken > best:
            best, count = gained / taken, number
    return best, ranked[:count]


def common_setting(
    search: Search, method: Searched, names: Sequence[str], first: Params
) -> Params:
    """A method's best setting over all classes, of those measured in all."""
    logs = [search.logs(name) for name in names]
    everywhere = [
        key
        for key in (logs[0] if logs else {})
        if Setting.from_key(key).strategy == method.name
        and all(key in of for of in logs)
    ]
    if not everywhere:
        return first
    best = max(
        everywhere, key=lambda key: fmean(fmean(of[key].values()) for of in logs)
    )
    return Setting.from_key(best).params
