"""Makes choices of the profiles that a run confirmed, for all classes together."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from adaptspec.profile import (
    ANSWER,
    EVERY_CLASS,
    LATENCY,
    PLAIN,
    ClassChoice,
    Pick,
    Profile,
)
from adaptspec_tuner.deciding.decide import Decided, decide
from adaptspec_tuner.deciding.rule import Candidate, Found
from adaptspec_tuner.measuring.profiler import Setting

# Objective -> what a ratio to plain decoding is of, in words.
MEASURES = {
    ANSWER: " in time per answer",
    LATENCY: " in p95 latency per token",
}

# Over all classes: by their geometric means, and added up.
MEANS = (
    *("tokens_per_second", "tokens_per_second_low", "tokens_per_second_high"),
    *("ratio", "ratio_low", "ratio_high"),
)
SUMS = (
    *("prompts", "tokens", "identical", "near_ties"),
    *("seconds_target", "seconds_draft", "seconds_rest"),
)


def decide_classes(
    confirmed: Mapping[str, Sequence[Profile]],
    records: Mapping[str, Mapping[str, Any]],
    tried: Mapping[str, Collection[str]],
    lossy: Collection[str],
    needs: Callable[[Setting], tuple[bool, bool]],
) -> tuple[list[ClassChoice], list[Profile]]:
    """Decide on all classes that a run has confirmed.

    Args:
        confirmed: Class -> its profiles, plain decoding among them.
        records: Class -> what ``confirm.as_record`` made.
        tried: Class -> strategies that were tried in it; over all, those of every one.
        lossy: Those that change the distribution of sampled output.
        needs: Of a setting, whether it runs the draft model, and whether heads.

    Returns:
        A choice for each class and one over all; and the profiles with the ratios and
        intervals that were decided on, those over all classes among them.
    """
    every = [profile for profiles in confirmed.values() for profile in profiles]
    settings = {_key(p): p for p in every if not _is_plain(p)}
    needed = {
        key: (False, False) if p.baseline else needs(Setting(p.strategy, p.params))
        for key, p in settings.items()
    }
    decided = decide(
        {name: _ratios(records[name], of) for name, of in confirmed.items()},
        {
            key: _candidate(
                [p for p in every if _key(p) == key], lossy, any(needed[key])
            )
            for key in settings
        },
        how=every[0].measurement.measured_how,
        measure=MEASURES.get(every[0].measurement.objective, ""),
    )
    updated = [
        p if (of := decided[name].found.get(_key(p))) is None else _with_found(p, of)
        for name, profiles in confirmed.items()
        for p in profiles
    ]
    # One time: of a strategy's settings, the store keeps those of the newest.
    newest = max(p.created for p in every)
    over_all = [
        _over_all(same, decided[EVERY_CLASS], newest)
        for key in dict.fromkeys(_key(p) for p in every)
        if (same := [p for p in every if _key(p) == key])
        and (key in decided[EVERY_CLASS].found or len(same) == len(confirmed))
    ]
    prompts = {name: decided[name].prompts for name in confirmed}
    prompts[EVERY_CLASS] = sum(prompts.values())
    everywhere = set.intersection(*(set(tried[name]) for name in confirmed))
    choices = [
        ClassChoice(
            environment=every[0].environment,
            run=every[0].run,
            prompt_class=name,
            created=max(p.created for p in confirmed.get(name, every)),
            picks=[
                _pick(key, reason, of, settings[key], needed[key], lossy)
                for key, reason in of.picks
            ],
            reason=of.plain,
            prompts=prompts[name],
            tried=sorted(everywhere if name == EVERY_CLASS else tried[name]),
            objective=every[0].measurement.objective,
        )
        for name, of in decided.items()
    ]
    return choices, [*updated, *over_all]


def _ratios(
    record: Mapping[str, Any],
    profiles: Sequence[Profile],
) -> Mapping[str, Mapping[str, Sequence[float]]]:
    """Setting key -> prompt id -> ratios, of the settings that were confirmed last."""
    found: dict[str, dict[str, Sequence[float]]] = {}
    kept = {_key(p) for p in profiles if not _is_plain(p)}
    for prompt, settings in record.get("ratios", {}).items():
        for key, ratios in settings.items():
            if key in kept:
                found.setdefault(key, {})[prompt] = ratios
    return found


def _key(profile: Profile) -> str:
    return Setting(profile.strategy, profile.params, profile.baseline).key


def _is_plain(profile: Profile) -> bool:
    return profile.strategy == PLAIN and not profile.baseline


def _candidate(
    measured: Sequence[Profile], lossy: Collection[str], second_model: bool
) -> Candidate:
    """A setting as it was measured in one or more classes."""
    peaks = [m for p in measured if (m := p.measurement.peak_memory) is not None]
    name, baseline = measured[0].strategy, measured[0].baseline
    # A lossy strategy's outputs differ by design; another's only by a fault.
    sound = all(p.lossless for p in measured) or name in lossy
    return Candidate(
        name=name,
        choosable=sound and not baseline,
        baseline=baseline,
        second_model=second_model,
        memory=max(peaks, default=None),
        drafting=sum(p.measurement.seconds_draft for p in measured)
        / sum(p.measurement.tokens for p in measured),
    )


def _with_found(profile: Profile, of: Found) -> Profile:
    measurement = replace(
        profile.measurement, ratio=of.ratio, interval_low=of.low, interval_high=of.high
    )
    return replace(profile, measurement=measurement)


def _pick(
    key: str,
    reason: str,
    of: Decided,
    profile: Profile,
    needed: tuple[bool, bool],
    lossy: Collection[str],
) -> Pick:
    found = of.found[key]
    assert found.low is not None
    assert found.high is not None
    return Pick(
        strategy=profile.strategy,
        params=dict(profile.params),
        reason=reason,
        ratio=found.ratio,
        low=found.low,
        high=found.high,
        needs_draft=needed[0],
        needs_heads=needed[1],
        lossless=profile.strategy not in lossy,
    )


def _over_all(every: Sequence[Profile], decided: Decided, created: datetime) -> Profile:
    """A setting over the classes that it was measured in, in equal parts."""
    first = every[0]
    measured = [p.measurement for p in every]
    told = [m for m in measured if m.tokens_per_forward]
    tokens = sum(m.tokens for m in told)
    forwards = sum(m.tokens / m.tokens_per_forward for m in told)
    latencies = [m.latency_p95 for m in measured if m.latency_p95]

    def mean(name: str) -> float:
        values = [max(getattr(m, name), 1e-6) for m in measured]
        return math.exp(sum(map(math.log, values)) / len(values))

    changed: dict[str, Any] = {name: mean(name) for name in MEANS}
    changed |= {name: sum(getattr(m, name) for m in measured) for name in SUMS}
    merged = replace(
        measured[0],
        **changed,
        tokens_per_forward=tokens / forwards if forwards else 0.0,
        acceptance=sum(m.acceptance for m in measured) / len(measured),
        latency_p95=sum(latencies) / len(latencies) if latencies else None,
        peak_memory=max(m.peak_memory or 0 for m in measured) or None,
    )
    found = decided.found.get(_key(first))
    profile = replace(
        first,
        prompt_class=EVERY_CLASS,
        created=created,
        lossless=all(p.lossless for p in every),
        measurement=merged,
        id=None,
    )
    return profile if found is None else _with_found(profile, found)
