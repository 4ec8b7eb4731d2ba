"""Sampling whose noise is a function of seed, prompt and position, not of a state.

Token ``i`` at ``position`` gets one uniform number from a counter-based hash
(splitmix64, Steele et al. 2014); the token that wins the exponential race is sampled,
as in the Gumbel-max trick. So whatever was drafted, the same distribution at the same
position yields the same token.
"""

from __future__ import annotations

import copy
import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from adaptspec.acceleration.argmax import argmax_rows
from adaptspec.errors import NoValidTokenError

if TYPE_CHECKING:
    from adaptspec.decoding.processing import Processors

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

SEEDS = 1 << 32  # of which one is drawn where none is given

# Streams of noise that must be independent of each other.
TARGET, ACCEPT, DRAFT = 1, 2, 3


class Sampler:
    """The controls of one run as a distribution, and the noise of its seed.

    Args:
        seed: None draws one from torch's own generator, so that ``torch.manual_seed``
            makes runs reproducible; greedy decoding needs none.
        prompt: Part of the noise's key: prompts of one length have noise of their own.
        pick: Another noise that picks the target's tokens:
            see :class:`~adaptspec.decoding.prepared.Prepared`.
    """

    def __init__(
        self,
        processors: Processors,
        seed: int | None,
        prompt: Sequence[int] = (),
        pick: Callable[[torch.Tensor, int], int] | None = None,
    ) -> None:
        self._processors, self._pick = processors, pick
        if seed is None and not processors.greedy:
            seed = int(torch.randint(SEEDS, ()))
        self.seed = seed
        self._key = key(seed or 0, _digest(() if processors.greedy else prompt))
        self._draws = 0

    def for_drafts(self) -> Sampler:
        """The same noise, under the controls that may be asked about any continuation.

        The distribution differs from the target's where a caller's own processors are
        in force.
        """
        drafts = copy.copy(self)
        drafts._processors = self._processors.for_drafts()
        return drafts

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self._processors.greedy

    @property
    def temperature(self) -> float:
        """0 for greedy."""
        return self._processors.temperature

    def probs(self, ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """The distribution ``[vocab]`` after ``ids`` (float32); one-hot if greedy.

        NaN throughout where there is none: see :meth:`distribution`.
        """
        scores = self._processors(ids, logits)
        if self.greedy:
            probs = torch.zeros_like(scores)
            probs[scores.argmax()] = 1.0
            return probs
        return scores.softmax(-1)

    def distribution(self, ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """The target's distribution ``[vocab]`` after ``ids``.

        Raises:
            NoValidTokenError: if no token can be chosen from it.
        """
        probs = self.probs(ids, logits)
        if math.isnan(float(probs[0])):  # softmax leaves all NaN, or none
            raise no_valid_token(len(ids), logits)
        return probs

    def choose(self, ids: Sequence[int], logits: torch.Tensor) -> int:
        """The target's token after ``ids``: its position is ``len(ids)``.

        Raises:
            NoValidTokenError: if no token can be chosen.
        """
        if not self.greedy:
            return self.coupled(self.distribution(ids, logits), len(ids))
        scores = self._processors(ids, logits)
        if not choosable(float(scores.amax())):
            raise no_valid_token(len(ids), logits)
        return argmax_rows(scores[None])[0]

    def likeliest(self, ids: Sequence[int], logits: torch.Tensor) -> int:
        """The most likely token after ``ids``; of equals, the first."""
        return argmax_rows(self._processors(ids, logits)[None])[0]

    def coupled(self, probs: torch.Tensor, position: int) -> int:
        """The token the target's own noise at ``position`` picks from ``probs``."""
        if self._pick is not None:
            return self._pick(probs, position)
        return race(probs, key(self._key, position, TARGET))

    def uniform(self, position: int, attempt: int) -> float:
        """Noise in (0, 1) of the ``attempt``-th acceptance test at ``position``."""
        return unit(key(self._key, position, ACCEPT, attempt))

    def draw(self, probs: torch.Tensor, count: int = 1) -> list[int]:
        """Draw up to ``count`` distinct tokens, without replacement, in draw order."""
        self._draws += 1
        times = arrivals(probs, key(self._key, self._draws, DRAFT))
        count = min(count, int((probs > 0).sum()))
        order: list[int] = torch.topk(times, count, largest=False).indices.tolist()
        return order


def choosable(largest: float) -> bool:
    """Whether a row of scores with this maximum (NaN if any is) has a likeliest token.

    Infinity is one to ``generate``, too.
    """
    return not math.isnan(largest) and largest != -math.inf


def no_valid_token(position: int, logits: torch.Tensor) -> NoValidTokenError:
    """The error for the token at ``position``, whose raw ``logits [vocab]`` say why."""
    if choosable(float(logits.amax())):
        return NoValidTokenError(
            f"no token can be chosen at position {position}: the controls leave no "
            "finite score; loosen what masks tokens, or raise the temperature"
        )
    return NoValidTokenError(
        f"no token can be chosen at position {position}: the model's logits are NaN or "
        "-inf; try dtype float32, or pass remove_invalid_values=True"
    )


def _digest(prompt: Sequence[int]) -> int:
    """64 bits of a prompt's ids."""
    data = array("q", prompt).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def key(*parts: int) -> int:
    """Mix integers into one 64-bit key."""
    state = 0
    for part in parts:
        state = _mix((state ^ (part & MASK)) + GOLDEN & MASK)
    return state


def unit(state: int) -> float:
    """A number in (0, 1) from a key."""
    return ((_mix(state) >> 11) + 0.5) * 2.0**-53


def uniforms(state: int, indices: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), float64, one for each index under the key ``state``."""
    x = (indices.to(torch.int64) + 1) * _signed(GOLDEN) + _signed(state)
    x = (x ^ _shifted(x, 30)) * _signed(MIX[0])
    x = (x ^ _shifted(x, 27)) * _signed(MIX[1])
    x = x ^ _shifted(x, 31)
    return (_shifted(x, 11).to(torch.float64) + 0.5) * 2.0**-53


def arrivals(probs: torch.Tensor, state: int) -> torch.Tensor:
    """Exponential arrival times ``[vocab]`` at rates ``probs``; inf at rate 0."""
    times = torch.full(probs.shape, torch.inf, dtype=torch.float64, device=probs.device)
    support = probs.nonzero()[:, 0]
    noise = uniforms(state, support)
    times[support] = -noise.log() / probs[support].to(torch.float64)
    return times


def race(probs: torch.Tensor, state: int) -> int:
    """Sample one token from ``probs`` (``[vocab]``, any positive total)."""
    support = probs.nonzero()[:, 0]
    noise = uniforms(state, support)
    winner = (-noise.log() / probs[support].to(torch.float64)).argmin()
    return int(support[winner])


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * MIX[0] & MASK
    x = (x ^ (x >> 27)) * MIX[1] & MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
