"""Confirms finalists on held-out prompts, interleaved with plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean, median
from time import monotonic
from typing import TYPE_CHECKING, Any

from adaptspec.errors import stopped_by_user
from adaptspec.profile import SPEED, Measurement
from adaptspec_tuner.measuring.profiler import (
    PLAIN_SETTING,
    Agreement,
    Measurer,
    Sample,
    Setting,
    in_a_line,
    spread,
)

if TYPE_CHECKING:
    from adaptspec.workloads import Prompt


@dataclass(frozen=True)
class Confirmed:
    """One setting on the held-out prompts.

    Args:
        samples: Prompt id -> one per repeat.
        ratios: Prompt id -> how much better than plain decoding, per repeat.
    """

    setting: Setting
    measurement: Measurement
    lossless: bool
    samples: Mapping[str, Sequence[Sample]]
    ratios: Mapping[str, Sequence[float]] = field(default_factory=dict)


def confirm(
    measurer: Measurer,
    finalists: Sequence[Setting],
    prompts: Sequence[Prompt],
    *,
    repeats: int,
    in_time: Callable[[float, int], bool],
    warn: Callable[[str], None],
    objective: str = SPEED,
    clock: Callable[[], float] = monotonic,
    expected: float = 0.0,
) -> dict[str, Confirmed]:
    """What was found by setting key; plain decoding comes first.

    Prompt by prompt, the order reversed each time, one prompt at least. A setting that
    fails is dropped with a warning; so is a prompt that can't be decoded plainly.
    Prompts on which plain decoding ends with its first token tell nothing.

    Args:
        in_time: Whether another prompt may begin, given the seconds that the longest
            so far took with all settings, and how many were finished.
        expected: Seconds that a prompt will take, before one was seen.
    """
    settings = [PLAIN_SETTING, *finalists]
    # setting key -> prompt id -> its samples, one per repeat
    samples: dict[str, dict[str, list[Sample]]] = {s.key: {} for s in settings}
    failed: set[str] = set()  # prompts that can't be decoded plainly
    turn, longest = 0, expected
    for _ in range(repeats):
        # Or repeats would measure drafts copied from the same prompt's last answer.
        measurer.forget()
        for prompt in [p for p in prompts if p.id not in failed]:
            if turn and not in_time(longest, turn):
                break
            order = settings if turn % 2 == 0 else settings[::-1]
            turn += 1
            started = clock()
            found: dict[str, Sample] = {}
            errors: dict[str, Exception] = {}
            for setting in order:
                try:
                    found[setting.key] = measurer.measure(setting, prompt)
                # A third party's strategy may raise anything, and so may a model.
                except Exception as error:
                    if stopped_by_user(error):
                        raise
                    errors[setting.key] = error
            taken = clock() - started
            longest = taken if turn == 1 else max(longest, taken)
            if PLAIN_SETTING.key in errors:
                reason = in_a_line(errors[PLAIN_SETTING.key])
                failed.add(prompt.id)
                warn(f"prompt {prompt.id!r} is left out: {reason}")
                continue
            for key, sample in found.items():
                samples[key].setdefault(prompt.id, []).append(sample)
            for setting in [s for s in settings if s.key in errors]:
                warn(f"{setting.strategy} dropped: {errors[setting.key]}")
                settings = [s for s in settings if s.key != setting.key]
    plain = {
        key: runs for key, runs in samples[PLAIN_SETTING.key].items() if runs[0].speed
    }
    if not plain:
        return {}
    confirmed = {}
    for setting in settings:
        ours = {key: samples[setting.key].get(key, []) for key in plain}
        try:
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
        # A forward tells near ties, for which there may be no memory left.
        except Exception as error:
            if setting == PLAIN_SETTING or stopped_by_user(error):
                raise
            warn(f"{setting.strategy} dropped: {in_a_line(error)}")
            continue
        lossless = setting.baseline or "mismatch" not in agreed
        if not lossless:
            warn(
                f"NOT LOSSLESS: {setting.strategy} {dict(setting.params)} changed "
                f"{agreed.count('mismatch')} of {len(agreed)} outputs; never selected"
            )
        ratios = _ratios(ours, plain, objective)
        measurement = _measurement(ours, ratios, agreed, objective)
        confirmed[setting.key] = Confirmed(setting, measurement, lossless, ours, ratios)
    return confirmed


def as_record(confirmed: Mapping[str, Confirmed]) -> dict[str, Any]:
    """Speeds and ratios by prompt and acceptance by position, for the report.

    ``prompts``: prompt id -> setting key -> tokens/s per repeat; ``ratios``: the same
    of ratios to plain decoding in the objective; ``positions``: setting key ->
    ``[accepted, offered]`` by depth from 1.
    """
    prompts: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, dict[str, list[float]]] = {}
    positions: dict[str, list[list[int]]] = {}
    for key, found in confirmed.items():
        summed: list[list[int]] = []
        for prompt, runs in found.samples.items():
            prompts.setdefault(prompt, {})[key] = [run.speed for run in runs]
            ratios.setdefault(prompt, {})[key] = list(found.ratios.get(prompt, ()))
            for run in runs:
                for depth, (accepted, offered) in enumerate(run.positions):
                    if depth == len(summed):
                        summed.append([0, 0])
                    summed[depth][0] += accepted
                    summed[depth][1] += offered
        positions[key] = summed
    return {"prompts": prompts, "ratios": ratios, "positions": positions}


def _ratios(
    ours: Mapping[str, Sequence[Sample]],
    plain: Mapping[str, Sequence[Sample]],
    objective: str,
) -> dict[str, list[float]]:
    return {
        key: [a.gain(b, objective) for a, b in zip(runs, plain[key], strict=False)]
        for key, runs in ours.items()
    }


def _measurement(
    ours: Mapping[str, Sequence[Sample]],
    ratios: Mapping[str, Sequence[float]],
    agreed: Sequence[Agreement],
    objective: str,
) -> Measurement:
    """What was measured of a setting; its ratio isn't decided on yet."""
    speeds = [median(run.speed for run in runs) for runs in ours.values()]
    # A generation that ended at once has speed 0, of which there is no logarithm.
    typical = [max(median(repeats), 1e-6) for repeats in ratios.values() if repeats]
    every = [run for runs in ours.values() for run in runs]
    tokens = sum(len(run.tokens) for run in every)
    forwards = sum(run.forwards for run in every)
    proposed = sum(run.proposed for run in every)
    latencies = [run.latency_p95 for run in every if run.latency_p95]
    low, middle, high = spread(speeds)
    ratio_low, _, ratio_high = spread(typical)
    return Measurement(
        tokens_per_second=middle,
        tokens_per_second_low=low,
        tokens_per_second_high=high,
        ratio=geometric_mean(typical),
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
        latency_p95=median(latencies) if latencies else None,
        peak_memory=max((run.peak_memory for run in every), default=0) or None,
        objective=objective,
    )


def _worst(agreements: Sequence[Agreement]) -> Agreement:
    for kind in ("mismatch", "near_tie"):
        if kind in agreements:
            return "mismatch" if kind == "mismatch" else "near_tie"
    return "identical"
