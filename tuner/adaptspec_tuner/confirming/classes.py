"""The confirmation: each class's finalists measured, predicted and stored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from statistics import geometric_mean
from typing import Any

from adaptspec.errors import stopped_by_user
from adaptspec.profile import PLAIN, Profile
from adaptspec.selector import FEWEST_PROMPTS, Choice
from adaptspec.workloads import Prompt, Workload
from adaptspec_tuner.confirming.ahead import kept_as_stored, measured_ahead
from adaptspec_tuner.confirming.confirm import Confirmed, as_record, confirm
from adaptspec_tuner.confirming.finalists import Finalist
from adaptspec_tuner.confirming.kept import kept_classes
from adaptspec_tuner.confirming.time_needed import REPEATS, plain_once, relative_time
from adaptspec_tuner.measuring.profiler import (
    PLAIN_SETTING,
    Sample,
    in_a_line,
    typical,
)
from adaptspec_tuner.records import confirmed_key, predicted_key
from adaptspec_tuner.reporting.result import ClassResult, Tried
from adaptspec_tuner.searching.search import Arm
from adaptspec_tuner.tuning_run import TuningRun

BUSY = 0.1  # of the processors, worth telling


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
        staying = kept_as_stored(done, finalists, names)
        names = [name for name in names if name not in staying]
        ours = tuple(p for p in held_out.prompts if p.prompt_class in names)
        finalists, held_out = measured_ahead(
            run, finalists, tuning, replace(held_out, prompts=ours), plain
        )
        yield from ((name, {}) for name in staying)
    for index, name in enumerate(names):
        once = plain_once(run, tuning, name, plain)
        rest = sum(plain_once(run, tuning, left, plain) for left in names[index:])
        share = run.time.left * (once / rest if rest else 1 / (len(names) - index))
        always = 1 + len(baselines)
        chosen = _fitting(finalists.get(name, ()), _plain_times(share, once) - always)
        if run.given.once:  # they are measured already
            chosen = list(finalists.get(name, ()))
        expected = once * (always + sum(relative_time(found.ratio) for found in chosen))
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
            held_out.by_class().get(name, ()),
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


def _plain_times(seconds: float, once: float) -> float:
    """How often a class is decoded plainly in ``seconds``, on as many prompts as a
    choice takes."""
    return seconds / (FEWEST_PROMPTS * once) if once > 0 else math.inf


def _fitting(ranked: Sequence[Finalist], times: float) -> list[Finalist]:
    """As many as take no longer than plain decoding ``times`` times; one anyway."""
    taken = itertools.accumulate(relative_time(found.ratio) for found in ranked)
    fitting = sum(total <= times for total in taken)
    return list(ranked[: max(1, fitting)])


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
                run, held_out.by_class().get(name, ()), confirmed, corrections(arms)
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
