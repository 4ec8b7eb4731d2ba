"""The confirmation: each class's finalists picked, measured, predicted and stored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from statistics import fmean, geometric_mean, median
from typing import Any

from adaptspec.errors import stopped_by_user
from adaptspec.params import Scalar
from adaptspec.profile import PLAIN, Profile
from adaptspec.selector import FEWEST_PROMPTS, Choice
from adaptspec.workloads import Prompt, Workload
from adaptspec_tuner.confirming.confirm import Confirmed, as_record, confirm
from adaptspec_tuner.confirming.kept import Kept, kept_classes
from adaptspec_tuner.measuring.profiler import (
    PLAIN_SETTING,
    MeasuresAhead,
    Sample,
    Setting,
    in_a_line,
    typical,
)
from adaptspec_tuner.records import RunRecords, confirmed_key, predicted_key
from adaptspec_tuner.reporting.result import ClassResult, Tried
from adaptspec_tuner.searching.search import HOPELESS, Arm, Search
from adaptspec_tuner.searching.standings import Standings
from adaptspec_tuner.tuning_run import TuningRun

FINALISTS = 3
REPEATS = 3
GENERAL = 2  # of the strategies for prompts of any kind, those confirmed everywhere
BUSY = 0.1  # of the processors, worth telling


@dataclass(frozen=True)
class Finalist:
    """A setting to be confirmed, with the ratio to plain decoding to expect of it."""

    ratio: float
    setting: Setting


def confirm_classes(
    run: TuningRun,
    finalists: Mapping[str, Sequence[Finalist]],
    tuning: Workload,
    held_out: Workload,
    plain: Mapping[str, Sample],
) -> Iterator[tuple[str, dict[str, Confirmed]]]:
    """Each class of ``held_out`` that there is time for, with what was confirmed.

    With nothing where there is no time to confirm it once more.

    Args:
        finalists: By class, the most important first; there may be time for fewer.
        plain: Tuning prompt id -> its plain decoding.
    """
    baselines = run.given.baselines
    # A run that is continued begins with the classes it has no result of.
    done = kept_classes(run)
    names = sorted(held_out.classes, key=lambda name: name in done)
    if run.given.once:
        staying = _staying(done, finalists, names)
        names = [name for name in names if name not in staying]
        ours = tuple(p for p in held_out.prompts if p.prompt_class in names)
        finalists, held_out = measured_ahead(
            run, finalists, tuning, replace(held_out, prompts=ours), plain
        )
        yield from ((name, {}) for name in staying)
    for index, name in enumerate(names):
        once = _once(tuning, name, plain, run.environment.concurrency)
        rest = sum(
            _once(tuning, left, plain, run.environment.concurrency)
            for left in names[index:]
        )
        share = run.time.left * (once / rest if rest else 1 / (len(names) - index))
        always = 1 + len(baselines)
        chosen = _fitting(finalists.get(name, ()), _plain_times(share, once) - always)
        if run.given.once:  # they are measured already
            chosen = list(finalists.get(name, ()))
        expected = once * (always + sum(_share(found.ratio) for found in chosen))
        enough = run.given.once or FEWEST_PROMPTS * expected <= run.time.left
        if (index or name in done) and not enough:
            missing = [left for left in names[index:] if left not in done]
            again = [left for left in names[index:] if left in done]
            if missing:
                left = ", ".join(missing)
                run.warn(f"no time to confirm {left}; the same command continues")
            if again:
                left = ", ".join(again)
                run.warn(f"no time to confirm {left} again; what was confirmed stays")
            yield from ((left, {}) for left in again)
            break
        run.begin("confirm")
        run.doing(f"{name}: confirming on held-out prompts")
        watch = run.given.others
        others = None if watch is None else watch()
        confirmed = confirm(
            run.given.measurer,
            [*(found.setting for found in chosen), *baselines],
            _of_class(held_out, name),
            repeats=1 if run.given.once else REPEATS,
            in_time=run.time.confirming(share, FEWEST_PROMPTS),
            warn=run.warn,
            objective=run.options.objective,
            clock=run.clock,
            processor=run.given.processor,
            expected=expected,
            seed=run.options.seed,
        )
        taken = None if others is None else others.share()
        if taken is not None and taken > BUSY:
            run.warn(
                f"{name}: other programs took {taken:.0%} of the processors while it "
                "was confirmed; settings took turns, so it fell on all alike"
            )
        if not confirmed:
            run.warn(
                f"{name}: plain decoding fails or ends at once; nothing to compare"
            )
            continue
        yield name, confirmed


def _staying(
    done: Mapping[str, Kept],
    finalists: Mapping[str, Sequence[Finalist]],
    names: Sequence[str],
) -> list[str]:
    """Of an engine whose starts are dear the classes that stay as they are stored.

    All of these, while others have no result; else those whose finalists are confirmed.
    """
    if any(name not in done for name in names):
        return [name for name in names if name in done]
    known = {
        name: {Setting(p.strategy, dict(p.params)).key for p in kept.profiles}
        for name, kept in done.items()
    }
    return [
        name
        for name in names
        if all(found.setting.key in known[name] for found in finalists.get(name, ()))
    ]


def measured_ahead(
    run: TuningRun,
    finalists: Mapping[str, Sequence[Finalist]],
    tuning: Workload,
    held_out: Workload,
    plain: Mapping[str, Sample],
) -> tuple[Mapping[str, Sequence[Finalist]], Workload]:
    """The finalists that there is time for, measured on the prompts that there is time
    for: each setting is started once for all of its classes.

    Returns:
        What was measured: finalists and held-out prompts by class.
    """
    if not held_out.prompts:
        return {}, held_out
    measurer = run.given.measurer
    assert isinstance(measurer, MeasuresAhead)
    starting, beside_plain = run.given.starting, measurer.beside_plain
    at_once = run.environment.concurrency
    once = {name: _once(tuning, name, plain, at_once) for name in held_out.classes}
    kept = {name: list(finalists.get(name, ())) for name in held_out.classes}

    def takes(kept: Mapping[str, Sequence[Finalist]], prompts: int) -> float:
        # Each setting takes turns with plain decoding.
        settings = {f.setting.key for found in kept.values() for f in found}
        answers = sum(
            once[name] * (1 + _share(f.ratio)) for name in kept for f in kept[name]
        )
        starts = len(settings) + math.ceil(len(settings) / beside_plain)
        return starting * starts + prompts * answers

    kept = shortened(kept, lambda kept: takes(kept, FEWEST_PROMPTS), run.time.left)
    most = max(map(len, held_out.by_class().values()), default=0)
    fitting = [n for n in range(1, most + 1) if takes(kept, n) <= run.time.left]
    count = max(FEWEST_PROMPTS, *fitting, 0)
    prompts = {name: of[:count] for name, of in held_out.by_class().items()}
    asked: dict[str, tuple[Setting, list[Prompt]]] = {}
    for name, found in kept.items():
        for finalist in found:
            setting = finalist.setting
            asked.setdefault(setting.key, (setting, []))[1].extend(prompts[name])
    run.begin("confirm")
    run.doing("confirming on held-out prompts, setting by setting")
    ahead = measurer.measure_ahead(
        list(asked.values()),
        lambda: run.time.left >= run.given.starting,
        RunRecords(run.store, run.id),
    )
    keys = {setting.key for setting in ahead or ()}
    late = {key: setting for key, (setting, _) in asked.items() if key not in keys}
    for setting in late.values():
        run.warn(
            f"no time to confirm {setting.strategy} {dict(setting.params)}; the same "
            "command continues"
        )
    kept = {
        name: [f for f in found if f.setting.key not in late]
        for name, found in kept.items()
    }
    every = tuple(p for of in prompts.values() for p in of)
    return kept, replace(held_out, prompts=every)


def shortened(
    finalists: Mapping[str, Sequence[Finalist]],
    takes: Callable[[Mapping[str, Sequence[Finalist]]], float],
    left: float,
) -> dict[str, list[Finalist]]:
    """As many finalists as there is time for, one of each class at least.

    Those go first that cost the least gain for the time they take: one of a class, or a
    setting everywhere, whose start is then saved.

    Args:
        takes: Seconds of finalists by class.
    """
    kept = {name: list(found) for name, found in finalists.items()}
    while (now := takes(kept)) > left:
        settings = {f.setting.key for found in kept.values() for f in found}
        fewer = [
            {n: [f for f in of if f.setting.key != key] for n, of in kept.items()}
            for key in settings
        ]
        fewer += [
            {**kept, name: [f for f in found if f is not one]}
            for name, found in kept.items()
            for one in found
        ]
        # None that leaves a class without any, or saves no time.
        fewer = [
            less
            for less in fewer
            if all(less[name] or not kept[name] for name in kept) and takes(less) < now
        ]
        if not fewer:
            break
        before = _gained(kept)
        kept = min(
            fewer, key=lambda less: (before - _gained(less)) / (now - takes(less))
        )
    return kept


def _gained(finalists: Mapping[str, Sequence[Finalist]], doubt: float = 0.3) -> float:
    """What confirming these is worth: the log of each class's best ratio to plain
    decoding; of the next ones ``doubt`` times as much each, as they may be the best."""
    total = 0.0
    for found in finalists.values():
        ranked = sorted((f.ratio for f in found), reverse=True)
        for place, ratio in enumerate(ranked):
            total += doubt**place * max(0.0, math.log(ratio))
    return total


def _of_class(workload: Workload, name: str) -> Sequence[Prompt]:
    return workload.by_class().get(name, ())


def confirming_takes(
    run: TuningRun, tuning: Workload, held_out: Workload, plain: Mapping[str, Sample]
) -> tuple[float, float]:
    """Seconds that confirming every class takes, at least and with all repeats.

    At least: one setting and plain decoding on as many prompts as a choice takes; a
    round of the race that ends late is made up for. With all repeats: all finalists, as
    slow as plain decoding.
    """
    late = [
        sum(plain[p.id].seconds for p in _of_class(tuning, name) if p.id in plain)
        for name in held_out.classes
    ]
    at_once = run.environment.concurrency
    once = {name: _once(tuning, name, plain, at_once) for name in held_out.classes}
    others = 1 + len(run.given.baselines)
    least = FEWEST_PROMPTS * (others + 1) * sum(once.values())
    whole = (
        REPEATS
        * (others + FINALISTS + 1)
        * sum(
            len(_of_class(held_out, name)) * seconds for name, seconds in once.items()
        )
    )
    least += max(late, default=0.0)
    if run.given.once:  # a round of the search that ends late is of all classes
        least += sum(late) + run.given.starting * (2 + FINALISTS)
    return least, whole


def shortest_confirmation(
    run: TuningRun, tuning: Workload, plain: Mapping[str, Sample]
) -> float:
    """Seconds in which a setting is confirmed in each class beside plain decoding."""
    once = sum(
        _once(tuning, name, plain, run.environment.concurrency)
        for name in tuning.classes
    )
    starts = 2 * run.given.starting if run.given.once else 0.0
    return starts + 2 * FEWEST_PROMPTS * once


def _once(
    tuning: Workload, name: str, plain: Mapping[str, Sample], at_once: int
) -> float:
    """Seconds in which a prompt of the class is decoded plainly; its part of them
    where several are answered at the same time."""
    prompts = _of_class(tuning, name)
    seconds = [plain[p.id].seconds for p in prompts if p.id in plain]
    return median(seconds or [0.0]) / max(1, min(at_once, len(prompts)))


def _plain_times(seconds: float, once: float) -> float:
    """How often a class is decoded plainly in ``seconds``, on as many prompts as a
    choice takes."""
    return seconds / (FEWEST_PROMPTS * once) if once > 0 else math.inf


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


def _fitting(ranked: Sequence[Finalist], times: float) -> list[Finalist]:
    """As many as take no longer than plain decoding ``times`` times; one anyway."""
    taken = itertools.accumulate(_share(found.ratio) for found in ranked)
    fitting = sum(total <= times for total in taken)
    return list(ranked[: max(1, fitting)])


def _share(ratio: float) -> float:
    """Expected time relative to plain decoding; at least 1, as prefill isn't faster."""
    return 1 / min(1.0, max(ratio, HOPELESS))


def stored_class(
    run: TuningRun,
    arms: Sequence[Arm],
    held_out: Workload,
    name: str,
    confirmed: Mapping[str, Confirmed],
) -> tuple[ClassResult, dict[str, Any]]:
    """Store what was confirmed of a class, and what was predicted of it.

    Returns:
        The class, not yet decided on, and the record of what was confirmed.
    """
    given = run.given
    predicted: Mapping[str, float] = {}
    if given.replayer is not None:
        run.begin("replay")
        try:
            predicted = _predict(
                run, _of_class(held_out, name), confirmed, corrections(arms)
            )
        # A third party's strategy may raise anything; what was measured counts.
        except Exception as error:
            if stopped_by_user(error):
                raise
            run.warn(f"{name}: nothing is predicted: {in_a_line(error)}")
        run.keep(lambda: run.store.put_record(run.id, predicted_key(name), predicted))
    lossy = {cls.name for cls in given.strategies if not cls.lossless}
    now = datetime.now(timezone.utc)
    profiles = [
        Profile(
            run.environment,
            given.workload.digest,
            given.workload.name,
            name,
            found.setting.strategy,
            dict(found.setting.params),
            found.measurement,
            now,
            lossless=found.lossless and found.setting.strategy not in lossy,
            baseline=found.setting.baseline,
            run=run.id,
        )
        for found in confirmed.values()
    ]
    record = as_record(confirmed)
    run.keep(lambda: run.store.put_record(run.id, confirmed_key(name), record))
    run.keep(lambda: run.store.add_profiles(profiles))
    ours = [arm for arm in arms if arm.prompt_class == name]
    found_class = ClassResult(
        name,
        Choice(name, PLAIN),
        tuple(profiles),
        tried=[Tried.of(trial) for arm in ours for trial in arm.trials],
        reused=name in held_out.reused,
        predicted=predicted,
    )
    return found_class, record


def _predict(
    run: TuningRun,
    held_out: Sequence[Prompt],
    confirmed: Mapping[str, Confirmed],
    factors: Mapping[str, float],
) -> dict[str, float]:
    """Predict what was just confirmed, on the same prompts, while there is time.

    Args:
        factors: Strategy -> what its predictions are multiplied with.

    Returns:
        Setting key -> how much better than plain decoding in the objective.
    """
    names = {cls.name for cls in run.given.replaying}
    plain = confirmed[PLAIN_SETTING.key].samples
    prompts = [p for p in held_out if plain.get(p.id)]
    told = sorted(
        (
            f
            for f in confirmed.values()
            if f.setting.strategy in names and not f.setting.baseline
        ),
        key=lambda f: f.measurement.seconds_draft,
    )
    make = run.given.replayer
    if make is None or not told:
        return {}
    predictor = make([(p, typical(plain[p.id])) for p in prompts])
    if predictor is None:
        return {}
    bare = {p.id: predictor.measure(PLAIN_SETTING, p) for p in prompts}
    predicted: dict[str, float] = {}
    for found in told:
        repeats = max(1, max(map(len, found.samples.values()), default=1))
        drafting = found.measurement.seconds_draft / repeats
        if not run.time.predicting(drafting):
            break
        predictor.forget()
        objective = found.measurement.objective
        gains = [
            predictor.measure(found.setting, p).gain(bare[p.id], objective)
            for p in prompts
        ]
        factor = factors.get(found.setting.strategy, 1.0)
        mean = geometric_mean([max(gain, 1e-6) for gain in gains])
        predicted[found.setting.key] = factor * mean
    return predicted


def corrections(arms: Sequence[Arm], doubt: float = 1.0) -> dict[str, float]:
    """Strategy -> how much more the race measured than was predicted of it.

    Geometric means over settings of what a replay can't see: drafting beside a busy
    target, reading more rows of the prompt, tokens learnt from rejected candidates.

    Args:
        doubt: As many settings that were predicted right count, too.
    """
    off: dict[str, list[float]] = {}
    for arm in arms:
        for trial in arm.trials:
            promised = trial.detail.get("predicted")
            if trial.state == "complete" and promised:
                error = math.log(float(trial.detail["ratio"]) / float(promised))
                off.setdefault(arm.name, []).append(error)
    return {
        name: math.exp(sum(errors) / (len(errors) + doubt))
        for name, errors in off.items()
    }
