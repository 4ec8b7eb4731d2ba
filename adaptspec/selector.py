"""From profiles to a choice: pure, and the reason is part of the answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from adaptspec.params import Scalar
from adaptspec.profile import ANSWER, LATENCY, PLAIN, Environment, Profile

# Ratios this close count as equal; the simpler strategy then wins.
TIE = 0.02

# One prompt has no spread: its ratio may be the machine's mood.
FEWEST_PROMPTS = 2

# What a stale gain must have been above for sure to be used still.
STALE_MARGIN = 1.1
# Speed is theirs: another minor version makes a profile stale.
DECISIVE = ("adaptspec", "torch", "transformers")


@dataclass(frozen=True)
class Choice:
    """What to decode with, and why.

    ``lossless`` is False where sampled output follows another distribution than the
    target's.
    """

    prompt_class: str | None
    strategy: str
    params: Mapping[str, Scalar] = field(default_factory=dict)
    reason: str = ""
    lossless: bool = True


def select(
    profiles: Sequence[Profile],
    environment: Environment,
    prompt_class: str | None = None,
    lossy: Collection[str] = (),
) -> Choice:
    """The fastest lossless setting measured in ``environment`` for ``prompt_class``.

    Plain decoding is chosen where nothing was measured, where the measurement was taken
    elsewhere, and where nothing beat it: the lower end of the bootstrap interval of a
    strategy's ratio to plain decoding must be above 1, over two prompts or more. A
    profile measured with another minor version of torch, transformers or AdaptSpec is
    stale: its interval must have been above 1.1, and the reason says so. Ties within 2%
    go to the strategy with fewer parameters, then to the name that sorts first. Without
    a class the only profiled one is used, else ``default``.

    Args:
        lossy: Names of strategies that may be chosen though they are lossy. One that
            promised to be lossless and wasn't is never chosen.
    """
    usable = [
        p for p in profiles if (p.lossless or p.strategy in lossy) and not p.baseline
    ]
    here = measured_here(usable, environment)
    if not usable:
        return _plain(prompt_class, "nothing is profiled for this model; run tune")
    if not here:
        return _plain(prompt_class, _elsewhere(usable, environment))
    classes = sorted({p.prompt_class for p in here})
    if prompt_class is None:
        if len(classes) > 1 and "default" not in classes:
            return _plain(
                None, f"no prompt_class given; profiled: {', '.join(classes)}"
            )
        wanted = classes[0] if len(classes) == 1 else "default"
    else:
        wanted = prompt_class
    found = _latest([p for p in here if p.prompt_class == wanted])
    if not found:
        return _plain(
            prompt_class, f"class {wanted!r} isn't profiled; is: {', '.join(classes)}"
        )
    stale = stale_versions(found[0].environment, environment)
    bar = STALE_MARGIN if stale else 1.0
    faster = [
        p
        for p in found
        if p.strategy != PLAIN
        and p.measurement.interval_low is not None
        and p.measurement.interval_low > bar
        and p.measurement.prompts >= FEWEST_PROMPTS
    ]
    if not faster and max(p.measurement.prompts for p in found) < FEWEST_PROMPTS:
        return _plain(
            wanted,
            f"{wanted!r} was measured on one held-out prompt, {FEWEST_PROMPTS} are "
            "needed; tune with four prompts or more of the class",
        )
    if not faster and all(p.measurement.interval_low is None for p in found):
        return _plain(
            wanted,
            f"{wanted!r} was measured by an older version, without intervals; run tune "
            "again",
        )
    if not faster and stale:
        return _plain(
            wanted,
            f"the profile of {wanted!r} is stale ({stale}), and no gain was above "
            f"{STALE_MARGIN} for sure; run tune again",
        )
    if not faster:
        return _plain(wanted, f"measured: nothing is reliably faster on {wanted!r}")
    best = max(p.measurement.ratio for p in faster)
    tied = [p for p in faster if p.measurement.ratio >= best * (1 - TIE)]
    winner = min(tied, key=_simplest_first)
    what = {ANSWER: " in time per answer", LATENCY: " in p95 latency per token"}.get(
        winner.measurement.objective, ""
    )
    reason = (
        f"{winner.measurement.measured_how}, "
        f"{winner.measurement.ratio:.2f}x plain decoding{what} on {wanted!r} "
        f"(95% interval {winner.measurement.interval_low:.2f}-"
        f"{winner.measurement.interval_high:.2f}, {winner.measurement.prompts} prompts)"
    )
    if winner.environment.heads != environment.heads:
        reason += f"; measured without {environment.heads_name}: run tune with them"
    if stale:
        reason += f"; the profile is stale ({stale}): run tune again"
    elif changed := _changed(winner.environment, environment):
        reason += f"; measured with other versions: {changed}"
    return Choice(wanted, winner.strategy, dict(winner.params), reason, winner.lossless)


def measured_here(
    profiles: Sequence[Profile], environment: Environment
) -> list[Profile]:
    """Those that hold in ``environment``.

    Where nothing was measured with the trained heads that are attached, what was
    measured without any holds: heads that aren't asked cost nothing.
    """
    here = [p for p in profiles if p.environment.key() == environment.key()]
    if here or environment.heads is None:
        return here
    bare = (*environment.place(), None)
    return [p for p in profiles if p.environment.key() == bare]


def stale_versions(then: Environment, now: Environment) -> str:
    """What minor versions changed since; empty where a profile is fresh."""
    return ", ".join(
        f"{name} {then.versions[name]} then, {now.versions[name]} now"
        for name in DECISIVE
        if name in then.versions
        and name in now.versions
        and _minor(then.versions[name]) != _minor(now.versions[name])
    )


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def _simplest_first(profile: Profile) -> tuple[int, float, str, float, str]:
    """A total order, so that the order of profiles doesn't matter."""
    measurement = profile.measurement
    return (
        len(profile.params),
        -measurement.ratio,
        profile.strategy,
        -(measurement.interval_low or 0.0),
        repr(sorted(profile.params.items())),
    )


def _plain(prompt_class: str | None, reason: str) -> Choice:
    return Choice(prompt_class, PLAIN, {}, f"plain decoding: {reason}")


def _latest(profiles: Sequence[Profile]) -> list[Profile]:
    """Those of the newest run: results of different runs aren't compared."""
    if not profiles:
        return []
    newest = max(profiles, key=lambda p: (p.created, p.run))
    return [p for p in profiles if p.run == newest.run]


def _elsewhere(profiles: Sequence[Profile], environment: Environment) -> str:
    names = ("model", "draft", "dtype", "device", "device_name", "threads", "heads")
    key = environment.key()
    nearest = max(
        (p.environment.key() for p in profiles),
        key=lambda other: sum(a == b for a, b in zip(other, key, strict=True)),
    )
    differences = [
        f"{name} {theirs} (here {ours})"
        for name, theirs, ours in zip(names, nearest, key, strict=True)
        if theirs != ours
    ]
    return f"profiled elsewhere, with {', '.join(differences)}; run tune here"


def _changed(then: Environment, now: Environment) -> str:
    return ", ".join(
        f"{name} {then.versions.get(name)} then, {version} now"
        for name, version in sorted(now.versions.items())
        if name != "python" and then.versions.get(name, version) != version
    )
