"""Settings that may be faster than plain decoding, where a tune couldn't tell."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from adaptspec.profile import PLAIN, Environment, Pick, Profile
from adaptspec.selector import Ranking, stale_versions


def with_unsure(
    ranking: Ranking,
    profiles: Sequence[Profile],
    environment: Environment,
    lossy: Collection[str] = (),
    refused: Callable[[Pick], str | None] = lambda pick: None,
    *,
    gain: float = 1.1,
    most: int = 2,
) -> Ranking:
    """Add what requests may try where nothing was found reliably faster.

    Only what the run that decided measured as a little faster on the class, with the
    same draft model and heads, and what may be so by more.

    Args:
        ranking: Returned as it is where something was found faster, or nothing was
            decided.
        lossy: Names of strategies that may be used though they are lossy.
        refused: Why a setting can't be used here; None if it can.
        gain: The upper end of a setting's 95% interval is that at least, as a ratio to
            plain decoding.
        most: As many settings, of different strategies.
    """
    decided = ranking.decided
    if decided is None or decided.picks:
        return ranking
    then = decided.environment
    # Whether a setting asked the draft model or the heads of the tune isn't stored.
    attached = (then.draft, then.heads) == (environment.draft, environment.heads)
    if not attached or stale_versions(then, environment):
        return ranking
    best: dict[str, Pick] = {}
    for profile in sorted(profiles, key=lambda p: -p.measurement.ratio):
        pick = _pick(profile)
        if (
            (profile.run, profile.prompt_class) == (decided.run, decided.prompt_class)
            and pick is not None
            and pick.ratio > 1
            and pick.high >= gain
            and (pick.lossless or pick.strategy in lossy)
            and refused(pick) is None
        ):
            best.setdefault(pick.strategy, pick)
    picks = list(best.values())[:most]
    if not picks:
        return ranking
    names = " and ".join(pick.strategy for pick in picks)
    plain = ranking.choices[-1]
    tried = [
        replace(
            plain,
            strategy=pick.strategy,
            params=pick.params,
            reason=pick.reason,
            lossless=pick.lossless,
        )
        for pick in picks
    ]
    said = f"{plain.reason}; some requests try {names}, to see"
    plain = replace(plain, reason=said)
    return replace(ranking, choices=[*tried, plain], picks=picks, unsure=True)


def _pick(profile: Profile) -> Pick | None:
    """A profile's setting; None where it can't be chosen."""
    measured = profile.measurement
    low, high = measured.interval_low, measured.interval_high
    if profile.strategy == PLAIN or profile.baseline or low is None or high is None:
        return None
    reason = (
        f"measured {measured.ratio:.2f}x plain decoding (95% interval {low:.2f}-"
        f"{high:.2f}), which doesn't tell for sure"
    )
    return Pick(
        profile.strategy,
        dict(profile.params),
        reason,
        measured.ratio,
        low,
        high,
        lossless=profile.lossless,
    )
