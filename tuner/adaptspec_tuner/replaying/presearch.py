"""A search without the target model: which settings are worth measuring first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaptspec.profile import ANSWER
from adaptspec_tuner.records import replayed_key
from adaptspec_tuner.searching.search import Search

if TYPE_CHECKING:
    from adaptspec.params import Scalar
    from adaptspec.profile import Trial
    from adaptspec.strategy import Strategy
    from adaptspec.workloads import Prompt
    from adaptspec_tuner.replaying.replayer import Replayer

TRIALS = 100  # of one strategy and class


class Presearch:
    """Predicted trials of every class and strategy that replays.

    Args:
        seconds: What they took.
        tried: (class, strategy) -> its trials in their order.
    """

    def __init__(
        self, seconds: float, tried: Mapping[tuple[str, str], list[Trial]]
    ) -> None:
        self.seconds, self.tried = seconds, tried
        self.trials = sum(map(len, tried.values()))

    def ranked(self, prompt_class: str, strategy: str) -> list[Trial]:
        """The complete trials of a strategy in a class, the most promising first."""
        trials = self.tried.get((prompt_class, strategy), ())
        complete = [trial for trial in trials if trial.state == "complete"]
        return sorted(complete, key=lambda t: -float(t.detail["ratio"]))


def as_records(tried: Presearch) -> dict[str, dict[str, Any]]:
    """Key -> replayed trials as JSON, for the report."""
    return {
        replayed_key(*key): {
            "trials": [
                {
                    "number": trial.number,
                    "params": dict(trial.params),
                    "state": trial.state,
                    "ratio": trial.detail.get("ratio"),
                    "error": trial.detail.get("error"),
                }
                for trial in trials
            ]
        }
        for key, trials in tried.tried.items()
    }


def presearch(
    replayer: Replayer,
    strategies: Sequence[type[Strategy]],
    prompts: Mapping[str, Sequence[Prompt]],
    *,
    in_time: Callable[[], bool],
    clock: Callable[[], float],
    warn: Callable[[str], None],
    seed: int = 0,
    first: Mapping[str, Sequence[Mapping[str, Scalar]]] | None = None,
    trials: int = TRIALS,
    objective: str = ANSWER,
) -> Presearch:
    """Search as with the model, by the same code, on predicted times.

    Args:
        prompts: Class -> its prompts; all must be recorded.
        first: Strategy -> settings that are tried first in every class.
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
        objective=objective,
    )
    for cls in strategies:
        for name, group in prompts.items():
            search.add(name, cls, group, (first or {}).get(cls.name, ()))
    search.search_alone()
    return Presearch(
        clock() - started,
        {(arm.prompt_class, arm.name): list(arm.trials) for arm in search.arms},
    )


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
