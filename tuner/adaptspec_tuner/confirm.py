"""Confirms finalists on held-out prompts, interleaved with plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from adaptspec.profile import Measurement
from adaptspec_tuner.profiler import (
    PLAIN_SETTING,
    Agreement,
    Measurer,
    Sample,
    Setting,
    spread,
)

if TYPE_CHECKING:
    from adaptspec_tuner.workloads import Prompt


def confirm(
    measurer: Measurer,
    finalists: Sequence[Setting],
    prompts: Sequence[Prompt],
    *,
    repeats: int,
    in_time: Callable[[], bool],
    warn: Callable[[str], None],
) -> dict[str, tuple[Setting, Measurement, bool]]:
    """Key -> setting, measurement, lossless; plain decoding comes first.

    Prompt by prompt, the order reversed each time. Time out ends it after the prompt
    at hand, one prompt at least; a setting that fails is dropped with a warning.
    Prompts on which plain decoding ends with its first token tell nothing.
    """
    settings = [PLAIN_SETTING, *finalists]
    # setting key -> prompt id -> its samples, one per repeat
    samples: dict[str, dict[str, list[Sample]]] = {s.key: {} for s in settings}
    turn = 0
    for _ in range(repeats):
        # Or repeats would measure drafts copied from the same prompt's last answer.
        measurer.forget()
        for prompt in prompts:
            if turn and not in_time():
                break
            order = settings if turn % 2 == 0 else settings[::-1]
            turn += 1
            for setting in list(order):
                try:
                    sample = measurer.measure(setting, prompt)
                # A third party's strategy may raise anything.
                except Exception as error:
                    if setting == PLAIN_SETTING:
                        raise
                    warn(f"{setting.strategy} dropped: {error}")
                    settings = [s for s in settings if s.key != setting.key]
                    continue
                samples[setting.key].setdefault(prompt.id, []).append(sample)
    plain = {
        key: runs for key, runs in samples[PLAIN_SETTING.key].items() if runs[0].speed
    }
    if not plain:
        return {}
    confirmed = {}
    for setting in settings:
        ours = {key: samples[setting.key].get(key, []) for key in plain}
        agreed = [
            _worst(
                [
                    measurer.agreement(p, plain[p.id][0].tokens, run.tokens)
                    for run in ours[p.id]
                ]
            )
            for p in prompts
            if p.id in plain
        ]
        lossless = setting.baseline or "mismatch" not in agreed
        if not lossless:
            warn(
                f"NOT LOSSLESS: {setting.strategy} {dict(setting.params)} changed "
                f"{agreed.count('mismatch')} of {len(agreed)} outputs; never selected"
            )
        measurement = _measurement(ours, plain, agreed)
        confirmed[setting.key] = (setting, measurement, lossless)
    return confirmed


def _measurement(
    ours: dict[str, list[Sample]],
    plain: dict[str, list[Sample]],
    agreed: Sequence[Agreement],
) -> Measurement:
    speeds = [median(run.speed for run in runs) for runs in ours.values()]
    ratios = [
        median(a.speed / b.speed for a, b in zip(runs, plain[key], strict=False))
        for key, runs in ours.items()
    ]
    every = [run for runs in ours.values() for run in runs]
    tokens = sum(len(run.tokens) for run in every)
    forwards = sum(run.forwards for run in every)
    proposed = sum(run.proposed for run in every)
    low, middle, high = spread(speeds)
    ratio_low, ratio, ratio_high = spread(ratios)
    return Measurement(
        tokens_per_second=middle,
        tokens_per_second_low=low,
        tokens_per_second_high=high,
        ratio=ratio,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        # The first token of each generation is the prefill's.
        tokens_per_forward=(tokens - len(every)) / forwards if forwards else 1.0,
        acceptance=sum(r.accepted for r in every) / proposed if proposed else 0.0,
        prompts=len(ours),
        tokens=tokens,
        identical=agreed.count("identical"),
        near_ties=agreed.count("near_tie"),
        seconds_target=sum(run.seconds_target for run in every),
        seconds_draft=sum(run.seconds_draft for run in every),
        seconds_rest=sum(run.seconds_rest for run in every),
    )


def _worst(agreements: Sequence[Agreement]) -> Agreement:
    for kind in ("mismatch", "near_tie"):
        if kind in agreements:
            return "mismatch" if kind == "mismatch" else "near_tie"
    return "identical"
