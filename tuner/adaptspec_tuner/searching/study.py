"""The trials of one class and strategy as an Optuna study.

The store is the truth. A trial is begun in the study, which gives it its number and
shows it to other processes; one transaction puts it in the store, which finishes it;
then the study learns the result. Whoever opens the study next makes good what a killed
process didn't get to: nothing finished is lost, nothing is counted twice.
"""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adaptspec.params import Params, Scalar
from adaptspec.profile import Trial
from adaptspec_tuner.searching.space import defaults, distributions, suggest, tuned

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

# A worker elsewhere that hasn't said anything for so long is taken for dead: longer
# than a generation takes, and than hosts' clocks differ.
SILENT_SECONDS = 900.0
BEAT_SECONDS = 20.0
UNSAID, UNSAID_SECONDS = 100, 0.02  # how often and long to wait for a setting
FIRST_TRIALS = 4  # at random, before the sampler models anything

# Names of a trial's user attributes.
SETTING, WORKER, BEAT, LOST = "setting", "worker", "beat", "lost"
RESULT = "result"  # a trial whole, for workers that don't reach the store


class Study:
    """One class and strategy's study; every process that opens it sees the same.

    Args:
        storage: Where other processes see it, too; None keeps it in memory.
        name: Unique in the storage.
        trials: What the store has of it.
        first: Settings to try first; the defaults come after them.
        labels: Shown by Optuna's tools.
    """

    def __init__(
        self,
        params: type[Params],
        trials: Sequence[Trial],
        *,
        seed: int = 0,
        first: Sequence[Mapping[str, Scalar]] = (),
        storage: BaseStorage | None = None,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._params, self._clock, self._beaten = params, clock, 0.0
        self._shared = storage is not None
        self._worker = this_process() if self._shared else ""
        self._suggested: list[Mapping[str, Scalar]] = []
        # Continued, it must not draw again what it drew before; nor what others draw.
        own = zlib.crc32(self._worker.encode()) if trials and self._shared else 0
        with quiet():
            sampler = optuna.samplers.TPESampler(
                seed=(seed + len(trials) + own) % 2**32,
                n_startup_trials=FIRST_TRIALS,
                multivariate=True,
                group=True,
                constant_liar=self._shared,
            )
            self._study = optuna.create_study(
                storage=storage,
                study_name=name,
                direction="maximize",
                sampler=sampler,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=2),
                load_if_exists=self._shared,
            )
            if self._shared:
                self._label(labels or {})
                self.repair(trials)
            self._add(trials)
            self._enqueue(trials, [*first, defaults(params)])

    def suggest(self, settings: Sequence[Mapping[str, Scalar]]) -> None:
        """Try these before the sampler's own, in place of what was suggested before and
        not begun."""
        self._suggested = list(settings)

    def ask(self) -> tuple[optuna.trial.Trial, dict[str, Scalar]]:
        """A trial begun, with its setting."""
        while True:
            # Stalled before it could say who it is, a process is taken for dead, and
            # the trial was given up: the next one, then.
            with quiet(), suppress(_finished_already()):
                if self._suggested:
                    wanted = tuned(self._params, self._suggested.pop(0))
                    self._study.enqueue_trial(wanted, skip_if_exists=True)
                asked = self._study.ask()
                setting = suggest(self._params, asked)
                if self._shared:
                    asked.set_user_attr(SETTING, dict(setting))
                    asked.set_user_attr(WORKER, self._worker)
                    self._beat(asked, always=True)
                return asked, setting

    def report(self, asked: optuna.trial.Trial, step: int, ratio: float) -> bool:
        """Tell one prompt's running ratio; whether to give the setting up."""
        with quiet(), suppress(_finished_already()):
            asked.report(ratio, step)
            if self._shared:
                self._beat(asked)
            return asked.should_prune()
        return False  # taken for dead; what it finds counts if nobody was faster

    def tell(self, asked: optuna.trial.Trial, trial: Trial) -> None:
        """What came of it: ``trial``, or one of the same setting."""
        self._tell(asked.number, asked._trial_id, trial)

    def withdraw(self, asked: optuna.trial.Trial) -> None:
        """Give it up; it doesn't count."""
        self._lose(asked.number, asked._trial_id)

    def begun_elsewhere(
        self, asked: optuna.trial.Trial
    ) -> dict[int, dict[str, Scalar]]:
        """Number -> setting of what other living processes began before ``asked``.

        Read the store after it, not before: what is finished meanwhile is in one of
        both.
        """
        if not self._shared:
            return {}
        for _ in range(UNSAID):
            earlier = [f for f in self._running() if f.number < asked.number]
            living = [f for f in earlier if self._lives(f)]
            if all(SETTING in frozen.user_attrs for frozen in living):
                break
            time.sleep(UNSAID_SECONDS)  # a trial is begun before its setting is told
        return {
            frozen.number: dict(frozen.user_attrs[SETTING])
            for frozen in living
            if SETTING in frozen.user_attrs
        }

    def told(self, trials: Sequence[Trial]) -> list[Trial]:
        """Trials that workers without a way to the store finished in the study alone.

        Args:
            trials: What the store has.
        """
        if not self._shared:
            return []
        stored = {trial.number for trial in trials}
        return [
            trial_of(frozen.user_attrs[RESULT])
            for frozen in self._study.get_trials(deepcopy=False)
            if frozen.number not in stored and RESULT in frozen.user_attrs
        ]

    def repair(self, trials: Sequence[Trial], keep: Container[int] = ()) -> None:
        """Tell the study what is finished, and give back what dead processes began.

        Args:
            keep: Numbers that this process is at; what else it began, it gave up.
        """
        stored = {trial.number: trial for trial in trials}
        for frozen in self._running():
            ours = frozen.user_attrs.get(WORKER) == self._worker
            if frozen.number in keep:
                continue
            if frozen.number in stored:
                self._tell(frozen.number, frozen._trial_id, stored[frozen.number])
            elif ours or not self._lives(frozen):
                self._lose(frozen.number, frozen._trial_id)
                setting = frozen.user_attrs.get(SETTING)
                done = any(_same(t.params, setting) for t in trials)
                if setting is not None and not done:
                    self._study.enqueue_trial(tuned(self._params, setting))

    def _label(self, labels: Mapping[str, str]) -> None:
        known = self._study.user_attrs
        for key, value in labels.items():
            if key not in known:
                self._study.set_user_attr(key, value)

    def _add(self, trials: Sequence[Trial]) -> None:
        """Trials that the store alone has, under their numbers."""
        import optuna

        stored = {trial.number: trial for trial in trials}
        there = len(self._study.get_trials(deepcopy=False))
        for number in range(there, max(stored, default=-1) + 1):
            if number in stored:
                self._study.add_trial(_frozen(self._params, stored[number]))
            else:
                failed = optuna.trial.TrialState.FAIL
                self._study.add_trial(
                    optuna.trial.create_trial(state=failed, user_attrs={LOST: True})
                )

    def _enqueue(
        self, trials: Sequence[Trial], settings: Sequence[Mapping[str, Scalar]]
    ) -> None:
        waiting = [
            dict(t.system_attrs.get("fixed_params", {}))
            for t in self._study.get_trials(deepcopy=False)
        ]
        known = [dict(trial.params) for trial in trials]
        for setting in settings:
            wanted = tuned(self._params, setting)
            if dict(setting) not in known and wanted not in waiting:
                known.append(dict(setting))
                self._study.enqueue_trial(wanted)

    def _running(self) -> list[FrozenTrial]:
        import optuna

        return self._study.get_trials(
            deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)
        )

    def _lives(self, frozen: FrozenTrial) -> bool:
        attrs = frozen.user_attrs
        silent = self._clock() - float(attrs.get(BEAT, 0.0))
        if WORKER not in attrs:
            # Begun a moment ago, or its process died in that moment.
            begun = frozen.datetime_start
            return (
                begun is not None and self._clock() - begun.timestamp() < BEAT_SECONDS
            )
        return alive(str(attrs[WORKER]), silent)

    def _beat(self, asked: optuna.trial.Trial, always: bool = False) -> None:
        now = self._clock()
        if always or now - self._beaten > BEAT_SECONDS:
            self._beaten = now
            # Taken for dead, its trial may have been made good by another process.
            with suppress(_finished_already()):
                asked.set_user_attr(BEAT, now)

    def _tell(self, number: int, trial_id: int, trial: Trial) -> None:
        # Another process may have made it good.
        with quiet(), suppress(ValueError, _finished_already()):
            if self._shared and trial.number == number:
                self._study._storage.set_trial_user_attr(
                    trial_id, RESULT, asdict(trial)
                )
            if trial.state == "complete":
                self._study.tell(number, float(trial.detail["ratio"]))
            else:
                self._study.tell(number, state=_state(trial))

    def _lose(self, number: int, trial_id: int) -> None:
        import optuna

        with quiet(), suppress(ValueError, _finished_already()):
            self._study._storage.set_trial_user_attr(trial_id, LOST, True)
            self._study.tell(number, state=optuna.trial.TrialState.FAIL)


def trial_of(record: Mapping[str, Any]) -> Trial:
    """The trial that ``asdict`` made ``record`` of."""
    return Trial(**record)


def this_process() -> str:
    """Who begins a trial: host, process, and when it was started."""
    import psutil  # type: ignore[import-untyped]

    pid = os.getpid()
    return f"{platform.node()}/{pid}/{psutil.Process(pid).create_time():.2f}"


def alive(worker: str, silent: float) -> bool:
    """Whether ``worker`` may still run, having said nothing for ``silent`` seconds.

    Here it is looked up; of a process elsewhere its silence must tell.
    """
    import psutil

    host, pid, began = worker.rsplit("/", 2) if worker.count("/") > 1 else ("", "", "")
    if host != platform.node():
        return silent < SILENT_SECONDS
    try:
        found = psutil.Process(int(pid))
        ended = found.status() == psutil.STATUS_ZOMBIE
        return not ended and abs(found.create_time() - float(began)) < 1.0
    except (psutil.Error, ValueError):
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings of experimental options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _same(one: Any, other: Any) -> bool:
    return bool(one) and json.dumps(one, sort_keys=True) == json.dumps(
        dict(other or {}), sort_keys=True
    )


def _frozen(params: type[Params], trial: Trial) -> FrozenTrial:
    import optuna

    space = distributions(params)
    values = tuned(params, trial.params)
    return optuna.trial.create_trial(
        params=values,
        distributions={name: space[name] for name in values},
        value=None if trial.state == "failed" else float(trial.detail["ratio"]),
        state=_state(trial),
        intermediate_values=dict(enumerate(trial.detail.get("running", ()))),
        user_attrs={SETTING: dict(trial.params)},
    )


def _state(trial: Trial) -> optuna.trial.TrialState:
    import optuna

    return optuna.trial.TrialState[
        {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}[trial.state]
    ]


def _finished_already() -> type[Exception]:
    import optuna

    return optuna.exceptions.UpdateFinishedTrialError
