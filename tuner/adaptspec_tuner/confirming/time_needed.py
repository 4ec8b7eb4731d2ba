"""How long confirming takes."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from adaptspec.selector import FEWEST_PROMPTS
from adaptspec.workloads import Workload
from adaptspec_tuner.confirming.finalists import FINALISTS
from adaptspec_tuner.confirming.kept import kept_classes
from adaptspec_tuner.measuring.profiler import Sample
from adaptspec_tuner.searching.search import HOPELESS
from adaptspec_tuner.tuning_run import TuningRun

REPEATS = 3


def confirming_takes(
    run: TuningRun, tuning: Workload, held_out: Workload, plain: Mapping[str, Sample]
) -> tuple[float, float]:
    """Seconds that confirming every class takes, at least and with all repeats.

    At least: one setting and plain decoding on as many prompts as a choice takes; a
    round of the race that ends late is made up for. With all repeats: all finalists, as
    slow as plain decoding.
    """
    asked, answered = tuning.by_class(), held_out.by_class()
    late = [
        sum(plain[p.id].seconds for p in asked.get(name, ()) if p.id in plain)
        for name in held_out.classes
    ]
    once = {name: plain_once(run, tuning, name, plain) for name in held_out.classes}
    others = 1 + len(run.given.baselines)
    least = FEWEST_PROMPTS * (others + 1) * sum(once.values())
    whole = (
        REPEATS
        * (others + FINALISTS + 1)
        * sum(len(answered.get(name, ())) * seconds for name, seconds in once.items())
    )
    least += max(late, default=0.0)
    if run.given.once:  # a round of the search that ends late is of all classes
        least += sum(late) + run.given.starts_take(1 + FINALISTS)
    return least, whole


def finalists_take(
    run: TuningRun, tuning: Workload, held_out: Workload, plain: Mapping[str, Sample]
) -> float:
    """Seconds in which the finalists of all classes without results are confirmed.

    On twice as many prompts as a choice takes: on fewer, few choices are sure.
    """
    done = kept_classes(run)
    left = {n: of for n, of in held_out.by_class().items() if n not in done}
    settings = 1 + len(run.given.baselines) + FINALISTS
    starts = run.given.starts_take(FINALISTS) if left else 0.0
    return starts + settings * sum(
        min(len(prompts), 2 * FEWEST_PROMPTS) * plain_once(run, tuning, name, plain)
        for name, prompts in left.items()
    )


def shortest_confirmation(
    run: TuningRun, tuning: Workload, plain: Mapping[str, Sample]
) -> float:
    """Seconds in which a setting is confirmed in each class beside plain decoding."""
    once = sum(plain_once(run, tuning, name, plain) for name in tuning.classes)
    return run.given.starts_take(1) + 2 * FEWEST_PROMPTS * once


def plain_once(
    run: TuningRun, tuning: Workload, name: str, plain: Mapping[str, Sample]
) -> float:
    """Seconds in which a prompt of the class is decoded plainly; its part of them
    where several are answered at the same time."""
    prompts = tuning.by_class().get(name, ())
    seconds = [plain[p.id].seconds for p in prompts if p.id in plain]
    at_once = min(run.environment.concurrency, len(prompts))
    return median(seconds or [0.0]) / max(1, at_once)


def relative_time(ratio: float) -> float:
    """Expected time relative to plain decoding; at least 1, as prefill isn't faster."""
    return 1 / min(1.0, max(ratio, HOPELESS))
