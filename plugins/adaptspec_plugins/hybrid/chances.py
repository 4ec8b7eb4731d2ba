"""How often a drafter's nodes are accepted, learnt while decoding.

Three stages, each the cure for the last one's fault: counts per drafter and evidence;
a logistic mixture of the drafters that name one token (they are not independent, so no
fixed rule combines them); a table of what was predicted against what came.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import exp, log
from typing import TYPE_CHECKING, Any

from adaptspec.knowledge import KnowledgeWarning

if TYPE_CHECKING:
    import torch

# (member's index, its evidence) for each member that proposes a node.
Marks = Sequence[tuple[int, int]]

BUCKETS = 1024
# Counts halve in about 350 observations: a few answers, so a table follows the kind of
# text and never outgrows 1 / (1 - KEPT).
KEPT = 0.998
MOST_SEEN = 1 / (1 - KEPT)
# A bucket counts for itself once it was seen this often; before, for its member.
THIN = 4.0
# Before anything is known, as if seen thrice: right once, or twice if it is a model. A
# timid start costs a free drafter nothing, since it learns unverified; a model that
# promises little isn't asked.
PRIOR, MODEL_PRIOR, PRIOR_SEEN = 1.0, 2.0, 3.0
# A sequence shifts a member's log-odds: how far, as a variance over sequences; how fast
# the shift is still followed late in a sequence, as the least variance.
SPREAD, LEAST_SPREAD = 1.0, 0.15
OFFSET_BOUND = 3.0
# Steps along the gradient of the log loss, which every sequence shares.
# At the n-th observation of a set of weights 2 / (n + 10), never less than this.
WEIGHT_STEP, WEIGHT_BOUND = 0.005, 4.0
MOST_RIVALS = 2  # told apart in the choice of weights
BINS, BIN_BOUND = 20, 6.0
# Pseudo-observations without error in each bin of the last stage.
BIN_PRIOR = 10.0
LEAST, MOST = 0.002, 0.995


class Counts:
    """One member's accepted and seen nodes per evidence, old ones fading."""

    def __init__(
        self, prior: float = PRIOR, known: Mapping[int, Sequence[float]] | None = None
    ) -> None:
        self._prior = prior
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

    def chance(self, evidence: int) -> float:
        """Mean of the bucket's posterior, shrunk to the member's mean while thin."""
        mean = (self._all_accepted + self._prior) / (self._all_seen + PRIOR_SEEN)
        return (self.accepted[evidence] + THIN * mean) / (self.seen[evidence] + THIN)

    def learn(self, evidence: int, right: bool) -> None:
        """Count one node whose parent was accepted."""
        self.accepted[evidence] = self.accepted[evidence] * KEPT + right
        self.seen[evidence] = self.seen[evidence] * KEPT + 1.0
        self._all_accepted = self._all_accepted * KEPT + right
        self._all_seen = self._all_seen * KEPT + 1.0

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
            seen = known[:, 1].clamp(0.0, MOST_SEEN)
            share = (known[:, 0] / known[:, 1].clamp_min(1e-6)).clamp(0.0, 1.0)
            known = torch.stack([share * seen, seen], 1)
        self._base = known.clone()
        self.accepted, self.seen = known.T.tolist()
        accepted, seen = known.sum(0).tolist()
        fade = min(1.0, MOST_SEEN / max(seen, 1e-6))
        self._all_accepted, self._all_seen = accepted * fade, seen * fade
        return known


class Shifts:
    """How far one sequence's log-odds are from the members' own, and how surely.

    A Kalman filter of a constant, seen through a logistic: it leaps at first and
    settles.
    """

    def __init__(self, members: int) -> None:
        self.offsets = [0.0] * members
        self._precisions = [1 / SPREAD] * members

    def learn(self, member: int, weight: float, chance: float, error: float) -> None:
        """Move one member's, whose log-odds entered a prediction with ``weight``."""
        precision = self._precisions[member] + weight * weight * chance * (1 - chance)
        self._precisions[member] = min(precision, 1 / LEAST_SPREAD)
        moved = self.offsets[member] + weight * error / precision
        self.offsets[member] = _clip(moved, OFFSET_BOUND)


class Calibration:
    """Chances that a node is accepted if its parent is.

    Args:
        names: The members; marks carry their indices.
        models: Those of them that draft with a model.
        prior: Member -> evidence -> accepted and seen, to begin with.
    """

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[str] = (),
        prior: Mapping[str, Mapping[int, Sequence[float]]] | None = None,
    ) -> None:
        prior = prior or {}
        self.counts = {
            name: Counts(MODEL_PRIOR if name in models else PRIOR, prior.get(name))
            for name in names
        }
        self._by_index = list(self.counts.values())
        # Who names the token, and how many at most name another -> bias, weights of
        # the members and, last, of the rival.
        self._weights: dict[tuple[int, int], list[float]] = {}
        self._updates: dict[tuple[int, int], int] = {}
        self._surplus = [0.0] * (BINS * (MOST_RIVALS + 1))  # right less predicted
        self._binned = [0.0] * (BINS * (MOST_RIVALS + 1))

    def fresh(self) -> Shifts:
        """The shifts of a sequence that begins."""
        return Shifts(len(self._by_index))

    def chance(self, marks: Marks, rival: Marks, shifts: Shifts) -> float:
        """How likely the node is right, given that its parent is.

        Args:
            marks: Who proposes it on which evidence; sorted by member.
            rival: The strongest sibling's marks of members that don't propose the node.
            shifts: The sequence's.
        """
        mixed = self._mixed(marks, rival, shifts)[0]
        at = _bin(mixed, rival)
        chance = _squash(mixed) + self._surplus[at] / (self._binned[at] + BIN_PRIOR)
        return min(max(chance, LEAST), MOST)

    def learn(self, marks: Marks, rival: Marks, shifts: Shifts, right: bool) -> None:
        """Learn from a node whose parent was accepted; moves ``shifts``."""
        mixed, weights, inputs = self._mixed(marks, rival, shifts)
        at, chance = _bin(mixed, rival), _squash(mixed)
        error = right - chance
        self._surplus[at] = self._surplus[at] * KEPT + error
        self._binned[at] = self._binned[at] * KEPT + 1.0
        key = _key(marks, rival)
        count = self._updates.get(key, 0)
        self._updates[key] = count + 1
        rate = max(WEIGHT_STEP, 2 / (count + 10)) * error
        weights[0] = _clip(weights[0] + rate, 2 * WEIGHT_BOUND)
        for i, (member, evidence) in enumerate(marks):
            self._by_index[member].learn(evidence, right)
            shifts.learn(member, weights[i + 1], chance, error)
        for i, value in enumerate(inputs, 1):
            moved = weights[i] + rate * value
            weights[i] = _clip(moved, WEIGHT_BOUND)

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

    def _mixed(
        self, marks: Marks, rival: Marks, shifts: Shifts
    ) -> tuple[float, list[float], list[float]]:
        """Log-odds of the mixture, its weights (bias first) and inputs."""
        key = _key(marks, rival)
        weights = self._weights.get(key)
        if weights is None:
            # Between the mean of the log-odds (all say the same) and their sum.
            weights = [0.0] + [1 / len(marks) ** 0.6] * len(marks) + [0.0]
            self._weights[key] = weights
        inputs = [
            _stretch(self._by_index[member].chance(evidence)) + shifts.offsets[member]
            for member, evidence in marks
        ]
        against = [self._by_index[other].chance(evidence) for other, evidence in rival]
        inputs.append(_stretch(max(against)) if against else 0.0)
        mixed = weights[0]
        for weight, value in zip(weights[1:], inputs, strict=True):
            mixed += weight * value
        return mixed, weights, inputs


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


def _stretch(chance: float) -> float:
    chance = min(max(chance, LEAST), MOST)
    return log(chance / (1.0 - chance))


def _squash(log_odds: float) -> float:
    return 1.0 / (1.0 + exp(-_clip(log_odds, 30.0)))


def _clip(value: float, bound: float) -> float:
    return min(max(value, -bound), bound)


def _bin(log_odds: float, rival: Marks) -> int:
    share = (_clip(log_odds, BIN_BOUND) + BIN_BOUND) / (2 * BIN_BOUND)
    return min(int(share * BINS), BINS - 1) + BINS * min(len(rival), MOST_RIVALS)


def _key(marks: Marks, rival: Marks) -> tuple[int, int]:
    members = 0
    for member, _ in marks:
        members |= 1 << member
    return members, min(len(rival), MOST_RIVALS)


@functools.cache
def shipped() -> Mapping[str, Mapping[int, Sequence[float]]]:
    """Member -> evidence -> accepted and seen."""
    stored = json.loads(files(__package__).joinpath("prior.json").read_text("utf-8"))
    return {
        name: {int(evidence): pair for evidence, pair in counts.items()}
        for name, counts in stored["counts"].items()
    }
