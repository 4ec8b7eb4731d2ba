"""How likely a drafter's nodes are accepted, learnt while decoding.

Counts for each drafter and evidence, and for each sequence how much better or worse
than those a drafter does in it. A node that several name has the chance of the one
that is surest of it: what they agree on is mostly what each would say alone.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import exp
from typing import TYPE_CHECKING, Any

from adaptspec.knowledge import KnowledgeWarning

if TYPE_CHECKING:
    import torch

# (member's index, its evidence) for each member that proposes a node.
Marks = Sequence[tuple[int, int]]

BUCKETS = 1024  # values of evidence that are told apart
LEAST, MOST = 0.002, 0.995  # no chance is taken to be lower, or higher


class Counts:
    """One member's accepted and seen nodes per evidence, old ones fading.

    Args:
        prior: Chance of a node before anything is known.
        prior_seen: As if so many nodes had been seen with it.
        known: Evidence -> accepted and seen, to begin with.
        own_from: A bucket counts for itself once it was seen so often; before, for its
            member.
        kept: What a new observation leaves of the older ones: they halve in about 350,
            a few answers, so the counts follow the kind of text.
    """

    def __init__(
        self,
        prior: float = 1 / 3,
        prior_seen: float = 3.0,
        known: Mapping[int, Sequence[float]] | None = None,
        own_from: float = 4.0,
        kept: float = 0.998,
    ) -> None:
        self._prior, self._prior_seen = prior, prior_seen
        self._own_from, self._kept = own_from, kept
        self.accepted = [0.0] * BUCKETS
        self.seen = [0.0] * BUCKETS
        for evidence, (accepted, seen) in (known or {}).items():
            self.accepted[evidence], self.seen[evidence] = accepted, seen
        self._all_accepted, self._all_seen = sum(self.accepted), sum(self.seen)
        # What is in every process's counts and in no one's experience.
        self._base: list[list[float]] | torch.Tensor | None = (
            [list(pair) for pair in zip(self.accepted, self.seen, strict=True)]
            if known
            else None
        )

    @property
    def most_seen(self) -> float:
        """What a bucket's fading observations add up to at most."""
        return 1 / (1 - self._kept)

    def chance(self, evidence: int) -> float:
        """Mean of the bucket's posterior, shrunk to the member's mean while thin."""
        few, thin = self._prior_seen, self._own_from
        mean = (self._all_accepted + self._prior * few) / (self._all_seen + few)
        return (self.accepted[evidence] + thin * mean) / (self.seen[evidence] + thin)

    def learn(self, evidence: int, right: bool) -> None:
        """Count one node whose parent was accepted."""
        self.accepted[evidence] = self.accepted[evidence] * self._kept + right
        self.seen[evidence] = self.seen[evidence] * self._kept + 1.0
        self._all_accepted = self._all_accepted * self._kept + right
        self._all_seen = self._all_seen * self._kept + 1.0

    def sync(self, stored: torch.Tensor | None) -> torch.Tensor:
        """Add what others stored since the last call; ``[1024, 2]`` to be stored.

        Columns are accepted and seen. None for ``stored`` keeps what is known here.
        """
        import torch

        known = torch.tensor([self.accepted, self.seen]).T.contiguous()
        if stored is not None:
            base = self._base
            if isinstance(base, list):
                base = torch.tensor(base)
            others = stored if base is None else stored - base
            known = known + others
            seen = known[:, 1].clamp(0.0, self.most_seen)
            share = (known[:, 0] / known[:, 1].clamp_min(1e-6)).clamp(0.0, 1.0)
            known = torch.stack([share * seen, seen], 1)
        self._base = known.clone()
        self.accepted, self.seen = known.T.tolist()
        accepted, seen = known.sum(0).tolist()
        fade = min(1.0, self.most_seen / max(seen, 1e-6))
        self._all_accepted, self._all_seen = accepted * fade, seen * fade
        return known


class Shifts:
    """How far one sequence's log-odds are from the members' own, and how surely.

    A Kalman filter of a constant, seen through a logistic: it leaps at first and
    settles.

    Args:
        members: How many.
        spread: Variance of a member's shift over sequences.
        least_spread: What is left of it late in a sequence, which may change its kind.
        most: A shift is no larger.
    """

    def __init__(
        self,
        members: int,
        spread: float = 1.0,
        least_spread: float = 0.15,
        most: float = 3.0,
    ) -> None:
        self._offsets = [0.0] * members
        self._precisions = [1 / spread] * members
        self._most_precision, self._most = 1 / least_spread, most

    def moved(self, member: int, chance: float) -> float:
        """A member's chance as it is in this sequence."""
        chance = min(max(chance, LEAST), MOST)
        odds = chance / (1.0 - chance) * exp(self._offsets[member])
        return min(max(odds / (1.0 + odds), LEAST), MOST)

    def learn(self, member: int, chance: float, right: bool) -> None:
        """Move one member's, who gave this (moved) chance to a node."""
        precision = self._precisions[member] + chance * (1 - chance)
        self._precisions[member] = min(precision, self._most_precision)
        offset = self._offsets[member] + (right - chance) / precision
        self._offsets[member] = min(max(offset, -self._most), self._most)


class Calibration:
    """Chances that a node is accepted if its parent is.

    Args:
        names: The members; marks carry their indices.
        models: Those of them that draft with a model.
        prior: Member -> evidence -> accepted and seen, to begin with.
        chance: Of a node before anything is known. Low, as a free drafter's nodes are
            learnt from unverified.
        models_chance: The same of a node of a model's, which must be asked to be seen.
    """

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[str] = (),
        prior: Mapping[str, Mapping[int, Sequence[float]]] | None = None,
        chance: float = 1 / 3,
        models_chance: float = 2 / 3,
    ) -> None:
        prior = prior or {}
        self.counts = {
            name: Counts(
                models_chance if name in models else chance, known=prior.get(name)
            )
            for name in names
        }
        self._by_index = list(self.counts.values())

    def fresh(self) -> Shifts:
        """The shifts of a sequence that begins."""
        return Shifts(len(self._by_index))

    def chance(self, marks: Marks, shifts: Shifts) -> float:
        """How likely the node is right, given that its parent is.

        Args:
            marks: Who proposes it on which evidence.
            shifts: The sequence's.
        """
        return max(
            shifts.moved(member, self._by_index[member].chance(evidence))
            for member, evidence in marks
        )

    def learn(self, marks: Marks, shifts: Shifts, right: bool) -> None:
        """Learn from a node whose parent was accepted; moves ``shifts``."""
        for member, evidence in marks:
            counts = self._by_index[member]
            shifts.learn(member, shifts.moved(member, counts.chance(evidence)), right)
            counts.learn(evidence, right)

    def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        """Merge the counts of every member; names nobody has here are left out."""
        held = {}
        for name, counts in self.counts.items():
            key = f"calibration/{name}"
            found = (stored or {}).get(key)
            if found is not None and (problem := _problem(found)):
                warnings.warn(
                    f"hybrid: {key} is not used and will be replaced: {problem}",
                    KnowledgeWarning,
                    stacklevel=2,
                )
                found = None
            held[key] = counts.sync(found)
        return held


def _problem(tensor: torch.Tensor) -> str | None:
    """Why stored counts can't be used, or None."""
    import torch

    if tuple(tensor.shape) != (BUCKETS, 2) or tensor.dtype != torch.float32:
        return (
            f"it must be float32 [{BUCKETS}, 2], "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )
    if not bool(tensor.isfinite().all()) or bool((tensor < 0).any()):
        return "counts must be finite and not negative"
    if bool((tensor[:, 0] > tensor[:, 1] + 1e-3).any()):
        return "accepted <= seen must hold"
    return None


@functools.cache
def shipped() -> Mapping[str, Mapping[int, Sequence[float]]]:
    """Member -> evidence -> accepted and seen."""
    stored = json.loads(files(__package__).joinpath("prior.json").read_text("utf-8"))
    return {
        name: {int(evidence): pair for evidence, pair in counts.items()}
        for name, counts in stored["counts"].items()
    }
