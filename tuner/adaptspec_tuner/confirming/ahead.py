"""Finalists of an engine whose starts are dear: measured setting by setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from adaptspec.selector import FEWEST_PROMPTS
from adaptspec.workloads import Prompt, Workload
from adaptspec_tuner.confirming.finalists import Finalist
from adaptspec_tuner.confirming.kept import Kept
from adaptspec_tuner.confirming.time_needed import plain_once, relative_time
from adaptspec_tuner.measuring.profiler import MeasuresAhead, Sample, Setting
from adaptspec_tuner.records import RunRecords
from adaptspec_tuner.tuning_run import TuningRun


def kept_as_stored(
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
    once = {name: plain_once(run, tuning, name, plain) for name in held_out.classes}
    kept = {name: list(finalists.get(name, ())) for name in held_out.classes}

    def takes(kept: Mapping[str, Sequence[Finalist]], prompts: int) -> float:
        # Each setting takes turns with plain decoding.
        settings = {f.setting.key for found in kept.values() for f in found}
        answers = sum(
            once[name] * (1 + relative_time(f.ratio))
            for name in kept
            for f in kept[name]
        )
        return run.given.starts_take(len(settings)) + prompts * answers

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
