"""What was learnt from requests, in plain words, for the reason of a choice."""

from __future__ import annotations

from collections.abc import Sequence

from adaptspec.profile import PLAIN, Use
from adaptspec.selector import Ranking


def learnt(
    ranking: Ranking, seen: Sequence[Use | None], place: int, best: int
) -> str | None:
    """Why the choice at ``place`` decodes; None where use said nothing of it.

    Args:
        seen: Of each choice of ``ranking``.
        best: The place of the choice that is expected to be fastest.
    """
    said = []
    if own := _seen(seen[place]):
        said.append(f"in use {own}")
    if place != best:
        said.append(f"tried since it may be faster than {_one(ranking, seen, best)}")
    elif place > 0:
        better = [
            other
            for other in range(min(place, len(ranking.picks)))
            if not ranking.unsure or _seen(seen[other])
        ]
        others = ", ".join(_one(ranking, seen, other) for other in better)
        if others:
            said.append(f"expected to be faster than {others}")
    return "; ".join(said) or None


def _one(ranking: Ranking, seen: Sequence[Use | None], place: int) -> str:
    """A setting with what was tuned of it and what use says."""
    name = ranking.choices[place].strategy
    if name == PLAIN:
        return "plain decoding"
    found = [f"tuned {ranking.picks[place].ratio:.2f}x"]
    if own := _seen(seen[place]):
        found.append(f"in use {own}")
    return f"{name} ({', '.join(found)})"


def _seen(use: Use | None) -> str:
    """What requests took; empty where it isn't known."""
    if use is None or use.ratio is None:
        return ""
    many = f"{use.requests} request{'' if use.requests == 1 else 's'}"
    return f"{use.ratio:.2f}x plain decoding lately, {many} so far"
