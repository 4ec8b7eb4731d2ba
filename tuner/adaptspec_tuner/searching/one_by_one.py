"""Opens the race of one class after the other, each with what those before it taught.

For engines whose settings can't be predicted: an answer is all that there is to learn
from, and long prompts make some of them dear. So most settings are tried in the classes
that are answered soonest, and the others begin with what was best there. New settings
are one step away from the best known; which steps pay is learnt over all classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

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
    starting: float = 0.0,
    share: float = 0.4,
    worth: float = 1.02,
    rounds: int = 2,
) -> dict[str, Params]:
    """Open the race of every class, and try new settings in it while time allows.

    Args:
        prompts: Class -> its tuning prompts.
        seconds: Class -> what one of its answers takes, plainly decoded.
        left: Seconds until the search ends; may be infinite.
        earlier: Class and method -> settings of earlier runs, best first.
        starting: Seconds that a setting takes to be ready.
        share: Of the seconds that opening the later classes leaves, what goes to new
            settings of a class.
        worth: How much better than the one before a setting must be to open the later
            classes.
        rounds: Of new settings, where there is no end.

    Returns:
        Method -> the setting that it was at last worth opening a class with.
    """
    common: dict[str, Params] = {m.name: defaults(m.Params) for m in methods}
    if not methods:
        return common
    learnt = Learnt()
    names = sorted(prompts, key=lambda name: seconds.get(name, 0.0))
    for at, name in enumerate(names):
        for method in methods:
            opening = [common[method.name]]
            opening += [
                p
                for p in earlier.get((name, method.name), ())[:1]
                if dict(p) != dict(opening[0])
            ]
            search.add(name, method, prompts[name], opening, entrants=len(opening))
        search.open(name, fitting(left(), seconds.get(name, 0.0) + starting))
        others = [seconds.get(n, 0.0) + starting for n in names[at + 1 :]]
        later = (1 + len(methods)) * sum(others)
        spare = left() - later
        end = left() - share * spare if math.isfinite(spare) else 0.0
        done = 0
        while left() > end if math.isfinite(spare) else done < rounds:
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
            if best is None or best == opened:
                continue
            least = standings.estimate(opened) if opened in standings else 0.0
            if standings.estimate(best) >= worth * least:
                common[method.name] = Setting.from_key(best).params
    return common


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
