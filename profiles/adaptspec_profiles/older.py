"""Makes choices for profiles of older versions, which stored none, by their rule."""

from __future__ import annotations

from collections.abc import Sequence

from adaptspec.profile import PLAIN, ClassChoice, Pick, Profile

# Ratios this close counted as equal; the setting of fewer parameters then won.
TIE = 0.02
FEWEST_PROMPTS = 2
# Strategies that drafted with a second model or with trained heads.
WITH_DRAFT = ("draft_model", "draft_tree", "hybrid", "universal_draft")
WITH_HEADS = ("medusa", "medusa_typical")


def choices_of(profiles: Sequence[Profile]) -> list[ClassChoice]:
    """A choice for each run and class of ``profiles``.

    The lower end of a setting's interval must be above 1, over two prompts or more.
    """
    groups: dict[tuple[str, str], list[Profile]] = {}
    for profile in profiles:
        groups.setdefault((profile.run, profile.prompt_class), []).append(profile)
    return [_choice(group) for group in groups.values()]


def _choice(group: Sequence[Profile]) -> ClassChoice:
    first = max(group, key=lambda p: p.created)
    faster = [
        p
        for p in group
        if p.strategy != PLAIN
        and not p.baseline
        and (p.measurement.interval_low or 0.0) > 1.0
        and p.measurement.prompts >= FEWEST_PROMPTS
    ]
    return ClassChoice(
        environment=first.environment,
        run=first.run,
        prompt_class=first.prompt_class,
        created=first.created,
        picks=[_pick(profile) for profile in _ranked(faster)],
        reason=f"measured: nothing is reliably faster on {first.prompt_class!r}",
        prompts=min(p.measurement.prompts for p in group),
        tried=sorted({p.strategy for p in group} - {PLAIN}),
        objective=first.measurement.objective,
    )


def _ranked(faster: Sequence[Profile]) -> list[Profile]:
    """The winner, then the winner among the others, and so on."""
    left, ranked = list(faster), []
    while left:
        best = max(p.measurement.ratio for p in left)
        tied = [p for p in left if p.measurement.ratio >= best * (1 - TIE)]
        winner = min(
            tied,
            key=lambda p: (len(p.params), -p.measurement.ratio, p.strategy),
        )
        left.remove(winner)
        ranked.append(winner)
    return ranked


def _pick(profile: Profile) -> Pick:
    m = profile.measurement
    low, high = m.interval_low or m.ratio, m.interval_high or m.ratio
    return Pick(
        strategy=profile.strategy,
        params=dict(profile.params),
        reason=(
            f"measured {m.ratio:.2f}x plain decoding on {profile.prompt_class!r} (95% "
            f"interval {low:.2f}-{high:.2f}, {m.prompts} prompts)"
        ),
        ratio=m.ratio,
        low=low,
        high=high,
        needs_draft=profile.environment.draft is not None
        and profile.strategy in WITH_DRAFT,
        needs_heads=profile.environment.heads is not None
        and profile.strategy in WITH_HEADS,
        lossless=profile.lossless,
    )
