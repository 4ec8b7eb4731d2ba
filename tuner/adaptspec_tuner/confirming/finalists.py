"""The last phase of a tune: each class's finalists confirmed, predicted and stored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from statistics import median

from adaptspec.errors import stopped_by_user
from adaptspec.profile import Profile
from adaptspec.selector import FEWEST_PROMPTS, select
from adaptspec.workloads import Prompt, Workload
from adaptspec_tuner.confirming.confirm import Confirmed, as_record, confirm
from adaptspec_tuner.measuring.bootstrap import overall
from adaptspec_tuner.measuring.profiler import (
    PLAIN_SETTING,
    Sample,
    Setting,
    in_a_line,
    typical,
)
from adaptspec_tuner.records import confirmed_key, predicted_key
from adaptspec_tuner.reporting.result import ClassResult, Tried
from adaptspec_tuner.searching.search import HOPELESS, Arm
from adaptspec_tuner.tuning_run import TuningRun

FINALISTS = 3
REPEATS = 3
BUSY = 0.1  # of the processors, worth telling


def confirm_classes(
    run: TuningRun, tuning: Workload, held_out: Workload, plain: Mapping[str, Sample]
) -> None:
    """Add a result for each class of ``held_out`` that there is time for.

    Args:
        plain: Tuning prompt id -> its plain decoding.
    """
    # A run that is continued begins with the classes it has no result of.
    done = {p.prompt_class for p in run.store.profiles(run=run.id)}
    names = sorted(held_out.classes, key=lambda name: name in done)
    for index, name in enumerate(names):
        once = _once(tuning, name, plain)
        share = run.time.left / (len(names) - index)
        always = 1 + len(run.baselines)
        ranked = _finalists(
            [arm for arm in run.search.arms if arm.prompt_class == name],
            _plain_times(share, once) - always,
        )
        finalists = [setting for _, setting in ranked]
        expected = once * (always + sum(_share(ratio) for ratio, _ in ranked))
        if index and FEWEST_PROMPTS * expected > run.time.left:
            left = ", ".join(names[index:])
            run.warn(f"no time to confirm {left}; the same command continues")
            break
        run.begin("confirm")
        run.doing(f"{name}: confirming on held-out prompts")
        others = None if run.others is None else run.others()
        confirmed = confirm(
            run.measurer,
            [*finalists, *run.baselines],
            _of_class(held_out, name),
            repeats=REPEATS,
            in_time=run.time.confirming(share, FEWEST_PROMPTS),
            warn=run.warn,
            objective=run.options.objective,
            clock=run.clock,
            processor=run.processor,
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
        _keep(run, held_out, name, confirmed)
    run.result.classes.sort(key=lambda found: held_out.classes.index(found.name))


def _of_class(workload: Workload, name: str) -> Sequence[Prompt]:
    return workload.by_class().get(name, ())


def least_confirmation(
    run: TuningRun, tuning: Workload, held_out: Workload, plain: Mapping[str, Sample]
) -> float:
    """Seconds in which one setting and plain decoding of every class are confirmed.

    On as many prompts as a choice takes; a trial that ends late is made up for.
    """
    whole = [
        sum(plain[p.id].seconds for p in _of_class(tuning, name) if p.id in plain)
        for name in held_out.classes
    ]
    once = sum(_once(tuning, name, plain) for name in held_out.classes)
    return FEWEST_PROMPTS * (2 + len(run.baselines)) * once + max(whole, default=0.0)


def _once(tuning: Workload, name: str, plain: Mapping[str, Sample]) -> float:
    """Seconds in which a prompt of the class is decoded plainly."""
    seconds = [plain[p.id].seconds for p in _of_class(tuning, name) if p.id in plain]
    return median(seconds or [0.0])


def _plain_times(seconds: float, once: float) -> float:
    """How often a class is decoded plainly in ``seconds``, on as many prompts as a
    choice takes."""
    return seconds / (FEWEST_PROMPTS * once) if once > 0 else math.inf


def _finalists(
    arms: Sequence[Arm], times: float = math.inf
) -> list[tuple[float, Setting]]:
    """The best setting of the best strategies, and what they are to plain decoding;
    hopeless ones only for want of any.

    Of a strategy that there was no time to try, what the replay promises most of.

    Args:
        times: They take no longer than plain decoding so many times; one is taken
            anyway.
    """
    found: list[tuple[float, Setting]] = []
    for arm in arms:
        if arm.best is not None:
            found.append((arm.ratio, Setting(arm.name, dict(arm.best.params))))
        elif not arm.trials and arm.predicted:
            key = max(arm.predicted, key=lambda key: arm.predicted[key])
            found.append((arm.predicted[key], Setting.from_key(key)))
    ranked = sorted(found, key=lambda pair: -pair[0])
    worth = [pair for pair in ranked if pair[0] >= HOPELESS][:FINALISTS] or ranked[:1]
    taken = itertools.accumulate(_share(ratio) for ratio, _ in worth)
    fitting = sum(total <= times for total in taken)
    return worth[: max(1, fitting)]


def _share(ratio: float) -> float:
    """Expected time relative to plain decoding; at least 1, as prefill isn't faster."""
    return 1 / min(1.0, max(ratio, HOPELESS))


def _keep(
    run: TuningRun, held_out: Workload, name: str, confirmed: Mapping[str, Confirmed]
) -> None:
    """Store what was confirmed of a class, what was predicted of it, and the choice."""
    predicted: Mapping[str, float] = {}
    if run.replayer is not None:
        run.begin("replay")
        try:
            predicted = _predict(run, _of_class(held_out, name), confirmed)
        # A third party's strategy may raise anything; what was measured counts.
        except Exception as error:
            if stopped_by_user(error):
                raise
            run.warn(f"{name}: nothing is predicted: {in_a_line(error)}")
        run.keep(lambda: run.store.put_record(run.id, predicted_key(name), predicted))
    lossy = {cls.name for cls in run.strategies if not cls.lossless}
    now = datetime.now(timezone.utc)
    profiles = [
        Profile(
            run.environment,
            run.workload.digest,
            run.workload.name,
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
    arms = [arm for arm in run.search.arms if arm.prompt_class == name]
    run.result.classes.append(
        ClassResult(
            name,
            select(profiles, run.environment, name),
            tuple(profiles),
            tried=[Tried.of(trial) for arm in arms for trial in arm.trials],
            reused=name in held_out.reused,
            predicted=predicted,
        )
    )


def _predict(
    run: TuningRun, held_out: Sequence[Prompt], confirmed: Mapping[str, Confirmed]
) -> dict[str, float]:
    """Predict what was just confirmed, on the same prompts, while there is time.

    Returns:
        Setting key -> how much better than plain decoding in the objective.
    """
    names = {cls.name for cls in run.replaying}
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
    if run.replayer is None or not told:
        return {}
    predictor = run.replayer([(p, typical(plain[p.id])) for p in prompts])
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
        gains = [
            [
                max(
                    predictor.measure(found.setting, p).gain(
                        bare[p.id], found.measurement.objective
                    ),
                    1e-6,
                )
            ]
            for p in prompts
        ]
        predicted[found.setting.key] = overall(gains)
    return predicted
