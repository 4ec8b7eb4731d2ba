"""Races each class's strategies, then searches the leaders' parameters with Optuna.

Every finished trial is stored at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from adaptspec.params import Params, Scalar
from adaptspec.profile import ANSWER, Trial
from adaptspec_tuner.measuring.profiler import Measurer, MeasuresAhead, Setting
from adaptspec_tuner.records import raced_key
from adaptspec_tuner.searching.space import distributions
from adaptspec_tuner.searching.standings import Standings
from adaptspec_tuner.searching.study import Study
from adaptspec_tuner.searching.trials import (
    Job,
    geometric_mean,
    run_together,
    run_trial,
)

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import Trial as Asked

    from adaptspec.workloads import Prompt
    from adaptspec_tuner.searching.space import Searched

HOPELESS = 0.7  # of plain decoding's speed, with the defaults
HOPELESS_TRIALS = 3
DUPLICATES = 10  # in a row: the space is as good as searched
FAILURES = 5  # in a row


class TrialStore(Protocol):
    """As much of a :class:`~adaptspec.profile.ProfileStore` as a search uses."""

    def trials(self, run: str) -> list[Trial]:
        """A run's finished trials."""

    def add_trial(self, trial: Trial) -> None:
        """Store a finished trial."""

    def record(self, run: str, key: str) -> dict[str, Any] | None:
        """A run's JSON record."""

    def put_record(self, run: str, key: str, value: Mapping[str, Any]) -> None:
        """Keep a run's JSON record."""


class TrialPool(Protocol):
    """Runs trials elsewhere, several at a time."""

    @property
    def size(self) -> int:
        """How many run at once; 0 where nobody is left."""

    def submit(self, job: Job) -> None:
        """Begin a trial."""

    def next(self) -> tuple[Job, Trial, Sequence[str]]:
        """Wait for any begun trial: what came of it, and what is to be warned of."""


Say = Callable[[str], None]
Doing = Callable[[str], None]


@dataclass(eq=False)
class Arm:
    """One strategy for one class: its study and its finished trials.

    Args:
        predicted: Setting key -> prompt id -> the ratio to plain decoding that a replay
            promised.
        entrants: How many of its first settings open the race.
        running: Number -> setting of the trials that this process began.
    """

    prompt_class: str
    name: str
    params: type[Params]
    prompts: Sequence[Prompt]
    study: Study
    trials: list[Trial] = field(default_factory=list)
    predicted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    entrants: int = 1
    exhausted: bool = False
    running: dict[int, dict[str, Scalar]] = field(default_factory=dict)

    @property
    def untouched(self) -> bool:
        """Whether no trial of it was begun."""
        return not (self.trials or self.running or self.exhausted)

    @property
    def best(self) -> Trial | None:
        """The complete trial with the highest ratio."""
        complete = [t for t in self.trials if t.state == "complete"]
        return max(complete, key=lambda t: float(t.detail["ratio"]), default=None)

    @property
    def ratio(self) -> float:
        """The best ratio to plain decoding so far, 0 before any."""
        return float(self.best.detail["ratio"]) if self.best else 0.0

    def promised(
        self, key: str, prompts: Sequence[Prompt] | None = None
    ) -> float | None:
        """The ratio that a replay promised of a setting, None if it said nothing.

        Args:
            prompts: On these; default: on all that were replayed.
        """
        known = self.predicted.get(key, {})
        wanted = list(known) if prompts is None else [p.id for p in prompts]
        if not wanted or any(name not in known for name in wanted):
            return None
        return geometric_mean([known[name] for name in wanted])

    def done(self, most: int, hopeless: int = HOPELESS_TRIALS) -> bool:
        """Whether it needs no more trials; of a slow arm ``hopeless`` are enough."""
        if self.ratio < HOPELESS:
            most = min(most, hopeless)
        return self.exhausted or len(self.trials) + len(self.running) >= most


class Search:
    """Races the arms of each class, or searches each arm by itself.

    Args:
        in_time: Whether another prompt may be measured.
        warn: Told of every mismatch and failed trial.
        doing: Told what is being measured.
        seed: Of the samplers.
        most: Trials of one arm, those of earlier runs included.
        hopeless: Trials after which an arm far slower than plain decoding is given up.
        objective: What a trial's ratio to plain decoding is about.
        storage: Optuna's, where the studies are kept; None keeps them in memory.
        labels: Shown by Optuna's tools with each study.
        pool: Runs trials in place of ``measurer``, several at a time.
        challengers: New settings that join a class's leaders in a round.
        rivals: Most leaders of a class that a round measures again.
        repeats: Most measurements of one of them on one prompt.
        first: Prompts on which new settings are measured.
        rest: Rounds of new settings for each repeat of the rivals.
    """

    def __init__(
        self,
        measurer: Measurer,
        store: TrialStore,
        run: str,
        *,
        in_time: Callable[[], bool],
        warn: Say,
        doing: Doing,
        seed: int = 0,
        most: int = 40,
        hopeless: int = HOPELESS_TRIALS,
        objective: str = ANSWER,
        storage: BaseStorage | None = None,
        labels: Mapping[str, str] | None = None,
        pool: TrialPool | None = None,
        challengers: int = 3,
        rivals: int = 3,
        repeats: int = 3,
        first: int = 2,
        rest: int = 4,
    ) -> None:
        self._pool = pool
        self._objective, self._storage = objective, storage
        self._labels = dict(labels or {})
        self._hopeless = hopeless
        self._measurer, self._store, self._run = measurer, store, run
        self._in_time, self._warn, self._doing = in_time, warn, doing
        self._seed, self._most = seed, most
        self._challengers, self._rivals = challengers, rivals
        self._repeats, self._first, self._rest = repeats, first, rest
        # By class: rounds of new settings, and of known ones.
        self._rounds, self._reruns = Counter[str](), Counter[str]()
        self._gave_way: set[tuple[str, str]] = set()  # leaders that failed later
        self.arms: list[Arm] = []
        self.finished = 0  # trials, by this process

    @property
    def first(self) -> int:
        """Prompts on which new settings are measured."""
        return self._first

    @property
    def tried(self) -> int:
        """Trials finished, by whomever, and those that this process is at."""
        return sum(len(arm.trials) + len(arm.running) for arm in self.arms)

    def add(
        self,
        prompt_class: str,
        strategy: Searched,
        prompts: Sequence[Prompt],
        first: Sequence[Mapping[str, Scalar]] = (),
        predicted: Mapping[str, Mapping[str, float]] | None = None,
        entrants: int = 1,
    ) -> None:
        """Search ``strategy`` on ``prompts``; what an earlier run finished counts.

        Args:
            first: Settings that are tried first; the defaults come after them.
            predicted: Setting key -> prompt id -> the ratio that a replay promised.
            entrants: How many of the first settings open the race.
        """
        trials = self._trials(prompt_class, strategy.name)
        study = Study(
            strategy.Params,
            trials,
            seed=self._seed,
            first=first,
            storage=self._storage,
            name=f"{self._run}/{prompt_class}/{strategy.name}",
            labels={
                **self._labels,
                "class": prompt_class,
                "strategy": strategy.name,
            },
        )
        self.arms.append(
            Arm(
                prompt_class,
                strategy.name,
                strategy.Params,
                prompts,
                study,
                trials,
                predicted or {},
                entrants,
                exhausted=bool(trials) and not distributions(strategy.Params),
            )
        )

    def race(self) -> list[Arm]:
        """Race the strategies of each class until time or ideas run out.

        A class begins with the first settings of every strategy, measured together,
        prompt by prompt, and drops those that are far behind. Then, the classes in
        turn, its close rivals go on to other prompts, and new settings of the promising
        strategies join.

        Returns:
            The arms that got no trial.
        """
        if self._pool is not None:
            self._search_on(self._pool)
        classes = list(dict.fromkeys(arm.prompt_class for arm in self.arms))
        for name in classes:
            self.open(name)
            self._rounds[name] += 1
        going = classes
        while going and self._in_time():
            going = [name for name in going if self._in_time() and self.round(name)]
        self._refresh()
        return [arm for arm in self.arms if not arm.trials]

    def search_alone(self) -> None:
        """Try every arm's first settings, then the promising arms', one by one."""
        for arm in self.arms:
            if not arm.trials and self._in_time():
                self._try(arm)
        while self._in_time() and (open_arm := self._next(self.arms)) is not None:
            self._try(open_arm)
        self._refresh()

    def standings(self, prompt_class: str) -> Standings:
        """What the settings of a class reached, by whomever they were measured."""
        found = Standings()
        arms = self._arms(prompt_class)
        for arm in arms:
            for trial in arm.trials:
                if trial.state == "failed":
                    continue
                found.add(
                    Setting(arm.name, dict(trial.params)).key,
                    trial.detail["prompts"],
                    trial.detail["ratios"],
                    dropped=trial.state == "pruned",
                )
        record = self._store.record(self._run, raced_key(prompt_class)) or {}
        names = {arm.name for arm in arms}
        for key, prompts in record.items():
            # A run that is continued may have known strategies that are gone.
            if Setting.from_key(key).strategy not in names:
                continue
            for prompt, ratios in prompts.items():
                found.add(key, [prompt] * len(ratios), ratios)
        for name, key in self._gave_way:
            if name == prompt_class:
                found.drop(key)
        return found

    def logs(self, prompt_class: str) -> dict[str, dict[str, float]]:
        """Setting key -> prompt id -> log ratio to plain decoding; those of a class."""
        return self.standings(prompt_class).logs()

    def _arm(self, prompt_class: str, strategy: str) -> Arm:
        return next(a for a in self._arms(prompt_class) if a.name == strategy)

    def _arms(self, prompt_class: str) -> list[Arm]:
        return [arm for arm in self.arms if arm.prompt_class == prompt_class]

    def _refresh(self) -> None:
        """Learn of trials that other processes finished."""
        if self._storage is not None:
            for arm in self.arms:
                arm.trials = self._stored(arm)

    def open(self, prompt_class: str) -> None:
        """Measure the first settings of all strategies of a class together."""
        entrants = [
            arm
            for arm in self._arms(prompt_class)
            if not arm.trials
            for _ in range(arm.entrants)
        ]
        self._try_together(prompt_class, entrants)

    def sweep(self, wanted: Mapping[str, Sequence[Setting]]) -> bool:
        """Measure new settings in several classes, each started once for all of them.

        What is measured already is left out.

        Args:
            wanted: Class -> settings.

        Returns:
            Whether anything was measured.
        """
        begun = {
            name: self._begin_these(name, settings) for name, settings in wanted.items()
        }
        asked: dict[str, tuple[Setting, list[Prompt]]] = {}
        for jobs in begun.values():
            for job in jobs:
                found = asked.setdefault(job.setting.key, (job.setting, []))
                found[1].extend(job.prompts)
        ahead = None
        if asked and isinstance(self._measurer, MeasuresAhead):
            self._doing("starting settings for all classes")
            self._measurer.forget()
            ahead = self._measurer.measure_ahead(list(asked.values()), self._in_time)
        measured = False
        for name, jobs in begun.items():
            if ahead is not None or self._in_time():
                measured |= self._measure_new(name, jobs, ahead)
            else:
                for arm, trial in jobs.values():
                    self._withdraw(arm, trial)
        return measured

    def _withdraw(self, arm: Arm, asked: Asked) -> None:
        """There was no time for it."""
        del arm.running[asked.number]
        arm.study.withdraw(asked)

    def _begin_these(
        self, prompt_class: str, settings: Sequence[Setting]
    ) -> dict[Job, tuple[Arm, Asked]]:
        """Those of the settings that are new in a class, on its first prompts."""
        begun: dict[Job, tuple[Arm, Asked]] = {}
        for setting in settings:
            arm = self._arm(prompt_class, setting.strategy)
            known = [dict(t.params) for t in arm.trials] + [*arm.running.values()]
            if dict(setting.params) in known or not self._in_time():
                continue
            arm.study.suggest([setting.params])
            if (found := self._begin(arm)) is None:
                continue
            asked, job = found
            begun[replace(job, prompts=arm.prompts[: self._first])] = arm, asked
        return begun

    def open_to(self, prompt_class: str, strategy: str) -> bool:
        """Whether a strategy may be tried once more in a class."""
        arm = self._arm(prompt_class, strategy)
        return not arm.done(self._most, self._hopeless)

    def round(self, prompt_class: str) -> bool:
        """One round of a class: close rivals on what they haven't seen, new settings.

        New settings run on the class's first prompts, those of one strategy on the
        same; only what isn't far behind there is measured on the others.

        Returns:
            Whether there was anything to measure.
        """
        arms = self._arms(prompt_class)
        standings = self.standings(prompt_class)
        rivals = standings.rivals(self._rivals)
        prompts, rounds = arms[0].prompts, self._rounds[prompt_class]
        seen = {
            p.id: min((standings.repeats(key, p.id) for key in rivals), default=0)
            for p in prompts
        }
        least = min(seen.values())
        close = len(rivals) > 1 and least < self._repeats
        # Through the prompts in turns with new settings, then once more now and then.
        due = (
            rounds > self._reruns[prompt_class]
            if least == 0
            else (least <= (rounds - self._reruns[prompt_class]) // self._rest)
        )
        if not (close and due):
            challengers: list[Arm] = []
            for _ in range(self._challengers):
                if (arm := self._next(arms, challengers)) is not None:
                    challengers.append(arm)
            self._rounds[prompt_class] += 1
            if challengers and self._try_together(prompt_class, challengers):
                return True
            if self._next(arms) is not None:
                return True
        if not close:
            return False
        self._reruns[prompt_class] += 1
        unseen = [p for p in prompts if seen[p.id] == least]
        return self._measure_again(prompt_class, rivals, unseen[: self._first])

    def _try_together(self, prompt_class: str, arms: Sequence[Arm]) -> bool:
        """A new setting of each of ``arms`` on the class's first prompts.

        Returns:
            Whether anything was measured.
        """
        begun: dict[Job, tuple[Arm, Asked]] = {}
        for arm in arms:
            if self._in_time() and (found := self._begin(arm)) is not None:
                asked, job = found
                prompts = arm.prompts[: self._first]
                promised = arm.promised(job.setting.key, prompts)
                job = replace(job, prompts=prompts, predicted=promised)
                begun[job] = arm, asked
        return self._measure_new(prompt_class, begun)

    def _measure_new(
        self,
        prompt_class: str,
        begun: Mapping[Job, tuple[Arm, Asked]],
        ahead: Sequence[Setting] | None = None,
    ) -> bool:
        """Measure what was begun in a class.

        Args:
            ahead: Settings that are measured already, which takes no more time.

        Returns:
            Whether anything was measured.
        """
        if not begun:
            return False
        self._tell_race(prompt_class, begun)
        standings = self.standings(prompt_class)
        ranked = standings.ranked()

        def given_up(ratios: Mapping[Job, Mapping[str, float]]) -> list[Job]:
            best = max(
                ratios.values(), key=lambda found: geometric_mean(found.values())
            )
            return [
                job
                for job, found in ratios.items()
                if standings.shown_slower(
                    [math.log(found[prompt] / best[prompt]) for prompt in found]
                )
                or (ranked and standings.slower_than(ranked[0], found))
            ]

        trials = run_together(
            self._measurer,
            list(begun),
            given_up,
            self._warn,
            in_time=self._in_time,
            ahead=ahead,
        )
        for (arm, asked), trial in zip(begun.values(), trials, strict=True):
            if trial is None:
                self._withdraw(arm, asked)
                continue
            for step, ratio in enumerate(trial.detail["running"]):
                arm.study.report(asked, step, ratio)
            self._finish(arm, asked, trial)
        return any(trial is not None for trial in trials)

    def _measure_again(
        self, prompt_class: str, keys: Sequence[str], prompts: Sequence[Prompt]
    ) -> bool:
        """Close rivals together on prompts that they have seen least."""
        jobs = [
            replace(self._known(prompt_class, key), prompts=prompts) for key in keys
        ]
        self._tell_race(prompt_class, jobs)
        trials = run_together(
            self._measurer, jobs, lambda _: (), self._warn, in_time=self._in_time
        )
        done = [(j, t) for j, t in zip(jobs, trials, strict=True) if t is not None]
        for job, trial in done:
            if trial.state == "failed":
                self._gave_way.add((prompt_class, job.setting.key))
            self._keep_again(prompt_class, job, trial)
        return any(trial.detail["ratios"] for _, trial in done)

    def _tell_race(self, prompt_class: str, jobs: Iterable[Job]) -> None:
        names = dict.fromkeys(job.strategy for job in jobs)
        self._doing(f"{prompt_class}: racing {', '.join(names)}")

    def _known(self, prompt_class: str, key: str) -> Job:
        """A setting that was tried before, to be measured once more."""
        setting = Setting.from_key(key)
        arm = next(a for a in self._arms(prompt_class) if a.name == setting.strategy)
        return self._job(arm, -1, dict(setting.params))

    def _keep_again(self, prompt_class: str, job: Job, trial: Trial) -> None:
        """Add to what is known of a setting whose trial is stored already."""
        key = raced_key(prompt_class)
        record = dict(self._store.record(self._run, key) or {})
        found = {p: list(r) for p, r in record.get(job.setting.key, {}).items()}
        for prompt, ratio in zip(
            trial.detail["prompts"], trial.detail["ratios"], strict=True
        ):
            found.setdefault(prompt, []).append(ratio)
        record[job.setting.key] = found
        self._store.put_record(self._run, key, record)

    def _next(self, arms: Sequence[Arm], taken: Sequence[Arm] = ()) -> Arm | None:
        """The open arm with the fewest trials for its promise.

        Args:
            taken: Arms of which one more is about to begin.
        """
        lead: dict[str, float] = {}
        for arm in self.arms:
            lead[arm.prompt_class] = max(lead.get(arm.prompt_class, 0.0), arm.ratio)
        opened = [arm for arm in arms if not arm.done(self._most, self._hopeless)]

        def spent(arm: Arm) -> float:
            share = arm.ratio / lead[arm.prompt_class] if arm.ratio else 0.1
            begun = len(arm.trials) + len(arm.running) + taken.count(arm)
            return begun / max(0.01, share**4)

        return min(opened, key=spent, default=None)

    def _stored(self, arm: Arm) -> list[Trial]:
        """The arm's trials, with those that workers told the study alone."""
        stored = self._trials(arm.prompt_class, arm.name)
        if not (told := arm.study.told(stored)):
            return stored
        for trial in told:
            self._store.add_trial(trial)
        return self._trials(arm.prompt_class, arm.name)

    def _trials(self, prompt_class: str, name: str) -> list[Trial]:
        return [
            t
            for t in self._store.trials(self._run)
            if (t.prompt_class, t.strategy) == (prompt_class, name)
            and (t.state == "failed" or isinstance(t.detail.get("ratio"), int | float))
        ]

    def _try(self, arm: Arm) -> None:
        begun = self._begin(arm)
        if begun is None:
            return
        asked, job = begun
        self._doing(f"{arm.prompt_class}: {arm.name}, trial {asked.number + 1}")
        trial = run_trial(
            self._measurer,
            job,
            lambda step, ratio: arm.study.report(asked, step, ratio),
            self._warn,
        )
        self._finish(arm, asked, trial)

    def _begin(self, arm: Arm) -> tuple[Asked, Job] | None:
        """A setting that nobody tried or tries; None where there is none."""
        for _ in range(DUPLICATES):
            if self._storage is not None:  # others may have finished some, or died
                arm.trials = self._stored(arm)
                arm.study.repair(arm.trials, keep=arm.running)
            asked, params = arm.study.ask()
            begun = {**arm.study.begun_elsewhere(asked), **arm.running}
            if self._storage is not None:
                arm.trials = self._stored(arm)
                for trial in arm.trials:
                    begun.pop(trial.number, None)
            if len(arm.trials) + len(begun) >= self._most:
                arm.study.withdraw(asked)
                arm.exhausted = True
                return None
            known = next((t for t in arm.trials if dict(t.params) == params), None)
            if known is not None:
                arm.study.tell(asked, known)
            elif params in begun.values():
                arm.study.withdraw(asked)
            else:
                break
        else:
            arm.exhausted = True
            return None
        arm.running[asked.number] = params
        return asked, self._job(arm, asked.number, params)

    def _job(self, arm: Arm, number: int, params: Mapping[str, Scalar]) -> Job:
        return Job(
            self._run,
            arm.prompt_class,
            arm.name,
            number,
            arm.params,
            params,
            arm.prompts,
            self._objective,
            arm.promised(Setting(arm.name, params).key, arm.prompts),
        )

    def _finish(self, arm: Arm, asked: Asked, trial: Trial) -> None:
        self._store.add_trial(trial)
        self.finished += 1
        del arm.running[asked.number]
        arm.trials.append(trial)
        arm.study.tell(asked, trial)
        last = arm.trials[-FAILURES:]
        failing = len(last) == FAILURES and all(t.state == "failed" for t in last)
        if failing or not distributions(arm.params):
            arm.exhausted = True

    def _search_on(self, pool: TrialPool) -> None:
        """Keep every worker of ``pool`` busy until time or ideas run out."""
        busy: dict[Job, tuple[Arm, Asked]] = {}
        while True:
            while len(busy) < pool.size and self._in_time():
                arm = next((a for a in self.arms if a.untouched), None) or self._next(
                    self.arms
                )
                if arm is None:
                    break
                if (begun := self._begin(arm)) is not None:
                    asked, job = begun
                    busy[job] = (arm, asked)
                    pool.submit(job)
            if not busy:
                return
            self._doing(f"{len(busy)} trials on the cluster")
            job, trial, warnings = pool.next()
            for text in warnings:
                self._warn(text)
            arm, asked = busy.pop(job)
            self._finish(arm, asked, trial)
