"""Who is confirmed of each class: its finalists, the most important first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from adaptspec.params import Scalar
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.searching.search import HOPELESS, Arm, Search
from adaptspec_tuner.searching.standings import Standings
from adaptspec_tuner.tuning_run import TuningRun

FINALISTS = 3
GENERAL = 2  # of the strategies for prompts of any kind, those confirmed everywhere


@dataclass(frozen=True)
class Finalist:
    """A setting to be confirmed, with the ratio to plain decoding to expect of it."""

    ratio: float
    setting: Setting


def finalists_of(
    run: TuningRun, search: Search, common: Mapping[str, Mapping[str, Scalar]]
) -> dict[str, list[Finalist]]:
    """What is confirmed of each class, the most important first.

    The class's best setting; of the leading strategies for prompts of any kind their
    settings for all classes; its best rivals of other strategies; and the setting for
    all classes of the strategy that leads over all.

    Args:
        common: Strategy -> its setting for all classes.
    """
    arms: dict[str, list[Arm]] = {}
    for arm in search.arms:
        arms.setdefault(arm.prompt_class, []).append(arm)
    standings = {name: search.standings(name) for name in arms}
    shared = {
        cls.name: Setting(cls.name, dict(common[cls.name]))
        for cls in run.given.strategies
    }
    everywhere: list[Setting] = []
    if len(arms) > 1:  # of one class all is its own
        general = [shared[c.name] for c in run.given.strategies if c.general]
        everywhere = general
        if len(general) > GENERAL:
            everywhere = overall_leaders(general, standings, GENERAL)
        everywhere += overall_leaders(shared.values(), standings, 1)
    return {
        name: finalists(
            [best for arm in group if (best := _best_of(arm, standings[name]))],
            [
                Finalist(_expected(setting, arm, standings[name]), setting)
                for setting in {s.key: s for s in everywhere}.values()
                for arm in group
                if arm.name == setting.strategy and not _failed(arm, setting)
            ],
        )
        for name, group in arms.items()
    }


def finalists(
    best: Sequence[Finalist],
    common: Sequence[Finalist],
    *,
    rivals: int = FINALISTS,
    worth: float = 1.02,
) -> list[Finalist]:
    """Who is confirmed of a class, the most important first.

    Args:
        best: The best setting of each strategy.
        common: Settings that are confirmed in every class, whatever they do in this.
        rivals: Of the best, as many strategies; hopeless ones only for want of any.
        worth: How much better a strategy's own setting must be than its common one.
    """
    shared = {found.setting.strategy: found for found in common}
    ranked: list[Finalist] = []
    for found in sorted(best, key=lambda f: -f.ratio):
        same = shared.get(found.setting.strategy)
        # Close settings of one strategy are one candidate: the common one.
        if same is not None and found.ratio < worth * same.ratio:
            found = same
        ranked.append(found)
    hopeful = [f for f in ranked if f.ratio >= HOPELESS] or ranked[:1]
    chosen = [*hopeful[:1], *common, *hopeful[1:rivals]]
    return list({found.setting.key: found for found in chosen}.values())


def overall_leaders(
    settings: Iterable[Setting], standings: Mapping[str, Standings], most: int
) -> list[Setting]:
    """Of the settings raced in all classes those with the best mean over all."""
    known = [
        setting
        for setting in settings
        if standings and all(setting.key in found for found in standings.values())
    ]

    def mean(setting: Setting) -> float:
        return fmean(math.log(f.estimate(setting.key)) for f in standings.values())

    return sorted(known, key=mean, reverse=True)[:most]


def _best_of(arm: Arm, standings: Standings) -> Finalist | None:
    """The best setting of a strategy; one that was never tried by what is promised."""
    keys = [Setting(arm.name, dict(trial.params)).key for trial in arm.trials]
    if ranked := standings.ranked(dict.fromkeys(keys)):
        return Finalist(standings.estimate(ranked[0]), Setting.from_key(ranked[0]))
    promised = {key: arm.promised(key) or 0.0 for key in arm.predicted}
    if not arm.trials and promised:
        key = max(promised, key=lambda key: promised[key])
        return Finalist(promised[key], Setting.from_key(key))
    return None


def _expected(setting: Setting, arm: Arm, standings: Standings) -> float:
    """The ratio to expect of a setting: raced, else promised, else plain decoding's."""
    if setting.key in standings:
        return standings.estimate(setting.key)
    return arm.promised(setting.key) or 1.0


def _failed(arm: Arm, setting: Setting) -> bool:
    return any(
        trial.state == "failed" and dict(trial.params) == dict(setting.params)
        for trial in arm.trials
    )
