"""Opens the race of one class after the other, each with what those before it taught.

For engines whose settings can't be predicted: an answer is all that there is to learn
from, and long prompts make some of them dear. So most settings are tried in the classes
that are answered soonest, and the others begin with what was best there. New settings
are one step away from the best known; which steps pay is learnt over all classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from adaptspec.engines.inference_engine import Method
from adaptspec.params import Scalar
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.searching.moves import Learnt, Move
from adaptspec_tuner.searching.search import Search
from adaptspec_tuner.searching.space import defaults

if TYPE_CHECKING:
    from adaptspec.workloads import Prompt
    from adaptspec_tuner.searching.space import Searched
    from adaptspec_tuner.searching.standings import Standings

Params = Mapping[str, Scalar]


def open_one_by_one(
    search: Search,
    methods: Sequence[Searched],
    prompts: Mapping[str, Sequence[Prompt]],
    seconds: Mapping[str, float],
    left: Callable[[], float],
    *,
    earlier: Mapping[tuple[str, str], Sequence[Params]],
    starting: Callable[[], float] = lambda: 0.0,
    opening: float = 0.6,
    fewest: int = 4,
    worth: float = 1.02,
    rounds: int = 2,
) -> dict[str, Params]:
    """Open the race of every class, and try new settings in it while time allows.

    Args:
        prompts: Class -> its tuning prompts.
        seconds: Class -> what one of its answers takes, plainly decoded.
        left: Seconds until the search ends; may be infinite.
        earlier: Class and method -> settings of earlier runs, best first.
        starting: Seconds that a setting takes to be ready, as far as is known.
        opening: Of a class's seconds, what opening its race may take; the rest goes to
            new settings. Its share of all seconds left is that of its answers.
        fewest: Settings that open the race of a class in any case.
        worth: How much better than the one before a setting must be to open the later
            classes.
        rounds: Of new settings, where there is no end.

    Returns:
        Method -> the setting that it was at last worth opening a class with.
    """
    common: dict[str, Params] = {m.name: first_setting(m) for m in methods}
    if not methods:
        return common
    learnt = Learnt()
    names = sorted(prompts, key=lambda name: seconds.get(name, 0.0))
    reached: dict[str, list[float]] = {}  # method -> log of its best, by class
    for at, name in enumerate(names):
        each = seconds.get(name, 0.0) + starting()
        rest = sum(seconds.get(n, 0.0) + starting() for n in names[at:])
        budget = left() * each / rest if rest else left()
        end = left() - budget
        once = search.first * seconds.get(name, 0.0) + starting()
        # All of them in the first class, whose answers are the soonest: they teach.
        most = fitting(left() if at == 0 else opening * budget, once)
        most = len(methods) if most is None else max(fewest, most)
        for method in ordered(methods, reached, most):
            first = [common[method.name]]
            first += [
                p
                for p in earlier.get((name, method.name), ())[:1]
                if dict(p) != dict(first[0])
            ]
            search.add(name, method, prompts[name], first, entrants=len(first))
        search.open(name, most)
        done = 0
        while left() > end if math.isfinite(end) else done < rounds:
            made: dict[str, tuple[Move, str]] = {}
            for method in methods:
                best = best_of(search.standings(name), method.name)
                if best is None:
                    continue
                found = learnt.settings(
                    method.name, method.Params, Setting.from_key(best).params
                )
                search.suggest(name, method.name, [setting for _, setting in found])
                for move, setting in found:
                    made[Setting(method.name, setting).key] = move, best
            before = search.standings(name)
            if not search.round(name):
                break
            done += 1
            after = search.standings(name)
            for key, (move, best) in made.items():
                if key in after and key not in before:
                    gain = after.estimate(key, 0.0) / after.estimate(best, 0.0)
                    learnt.tell(move, math.log(gain))
        standings = search.standings(name)
        for method in methods:
            opened = Setting(method.name, dict(common[method.name])).key
            best = best_of(standings, method.name)
            if best is not None:
                gains = reached.setdefault(method.name, [])
                gains.append(math.log(standings.estimate(best)))
            if best is None or best == opened:
                continue
            least = standings.estimate(opened) if opened in standings else 0.0
            if standings.estimate(best) >= worth * least:
                common[method.name] = Setting.from_key(best).params
    return common


def first_setting(method: Searched) -> Params:
    """What a method opens its first class with: its defaults, or what it names."""
    named = method.opening if isinstance(method, Method) else {}
    return {**defaults(method.Params), **named}


def ordered(
    methods: Sequence[Searched], reached: Mapping[str, Sequence[float]], most: int
) -> list[Searched]:
    """Methods in the order in which a class tries them; there is time for ``most``.

    Those that reached most in other classes are first, unknown ones before all. The
    last that there is time for is one that was tried least: what gains nothing in one
    class may gain much in another.

    Args:
        reached: Method -> log of its best ratio, by class.
    """
    ranked = sorted(methods, key=lambda m: -fmean(reached.get(m.name) or [math.inf]))
    if not 0 < most < len(ranked):
        return ranked
    kept, others = ranked[: most - 1], ranked[most - 1 :]
    least = min(others, key=lambda m: len(reached.get(m.name, ())))
    return [*kept, least, *(m for m in others if m is not least)]


def fitting(left: float, each: float) -> int | None:
    """How many settings there is time for beside plain decoding; None: all.

    Args:
        each: Seconds of one.
    """
    if each <= 0 or not math.isfinite(left):
        return None
    return max(0, int(left / each) - 1)


def best_of(standings: Standings, method: str) -> str | None:
    """The key of a method's best setting in a class; None where none was measured."""
    ranked = (k for k in standings.ranked() if Setting.from_key(k).strategy == method)
    return next(ranked, None)
