"""A search without the target model: which settings are worth measuring first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaptspec_tuner.profiler import PLAIN_SETTING
from adaptspec_tuner.search import Arm, Search

if TYPE_CHECKING:
    from adaptspec.profile import Trial
    from adaptspec.strategy import Strategy
    from adaptspec_tuner.replay import Replayer
    from adaptspec_tuner.workloads import Prompt

TRIALS = 100  # of one strategy and class
PROMISING = 2  # settings of each that are measured before any other


class Presearch:
    """Predicted trials of every class and strategy that replays.

    Args:
        trials: How many were made.
        seconds: What they took.
        best: (class, strategy) -> its most promising trials, best first.
    """

    def __init__(
        self, trials: int, seconds: float, best: Mapping[tuple[str, str], list[Trial]]
    ) -> None:
        self.trials, self.seconds, self.best = trials, seconds, best


def presearch(
    replayer: Replayer,
    strategies: Sequence[type[Strategy]],
    prompts: Mapping[str, Sequence[Prompt]],
    *,
    in_time: Callable[[], bool],
    clock: Callable[[], float],
    warn: Callable[[str], None],
    seed: int = 0,
    trials: int = TRIALS,
) -> Presearch:
    """Search as with the model, by the same code, on predicted times.

    Args:
        prompts: Class -> its prompts; all must be recorded.
        trials: Most of one strategy and class.
    """
    started = clock()
    search = Search(
        replayer,
        _Nowhere(),
        "",
        in_time=in_time,
        warn=warn,
        doing=lambda text: None,
        seed=seed,
        most=trials,
        hopeless=trials,  # a trial here costs next to nothing
    )
    plain = {
        prompt.id: replayer.measure(PLAIN_SETTING, prompt)
        for group in prompts.values()
        for prompt in group
    }
    for cls in strategies:
        for name, group in prompts.items():
            search.add(name, cls, group, plain)
    search.search()
    return Presearch(
        sum(len(arm.trials) for arm in search.arms),
        clock() - started,
        {(arm.prompt_class, arm.name): _best(arm) for arm in search.arms},
    )


def _best(arm: Arm) -> list[Trial]:
    complete = [trial for trial in arm.trials if trial.state == "complete"]
    return sorted(complete, key=lambda t: -float(t.detail["ratio"]))[:PROMISING]


class _Nowhere:
    """As much of a store as a search uses; keeps nothing."""

    def trials(self, run: str) -> list[Trial]:
        return []

    def add_trial(self, trial: Trial) -> None:
        pass

    def record(self, run: str, key: str) -> dict[str, Any] | None:
        return None

    def put_record(self, run: str, key: str, value: Mapping[str, Any]) -> None:
        pass
