"""A chain of tokens drawn from a model's logits, greedily, sampled or coupled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from adaptspec.strategy import Continuation, Drawn, SamplingDistribution, TokenTree

if TYPE_CHECKING:
    import torch

DEEPEST, BINS = 16, 16  # told apart in a node's evidence

DraftSampling = Literal["independent", "coupled"]


class DraftChain:
    """Draws draft tokens one after the other, each from what follows those before.

    Args:
        sampling: The controls in force.
        draft_sampling: Under sampling: independent draws that carry their
            distributions, or the tokens that the target's own noise picks.
        stop: The chain ends after a token of less probability than this.
        temperature: Under sampling: factor on the draft's temperature.
    """

    def __init__(
        self,
        sampling: SamplingDistribution,
        draft_sampling: DraftSampling,
        stop: float,
        temperature: float = 1.0,
    ) -> None:
        self._sampling = sampling
        self._sampled = not sampling.greedy and draft_sampling == "independent"
        self._stop = stop
        self._temperature = temperature

    def draft(
        self,
        ids: Sequence[int],
        count: int,
        after: Callable[[Sequence[int]], torch.Tensor],
        least: float = 0.0,
    ) -> TokenTree:
        """A chain of up to ``count`` tokens behind ``ids``; its root alone below one.

        ``after(drafted)`` gives the draft's logits ``[vocab]`` after the tokens drafted
        so far; each call has one token more, the first none. Where probabilities are
        asked for (``stop``), each node's evidence is its depth and its probability, and
        the chain ends, too, where it is all right with a probability below ``least``.
        """
        if count < 1:
            return TokenTree.root_only(ids[-1])
        drafted: list[int] = []
        draft_probs: list[torch.Tensor] = []
        evidence = [0]
        together = 1.0
        while True:
            found = self._next(Continuation(ids, drafted), after(drafted), draft_probs)
            if found is None:
                break
            token, confidence = found
            drafted.append(token)
            evidence.append(_evidence(len(drafted), confidence))
            # Stopping after the doubtful token, never before it: whether a token is
            # drafted must not depend on which token it is.
            together *= confidence
            if (
                len(drafted) == count
                or confidence < self._stop
                or (self._stop > 0 and together < least)
            ):
                break
        drawn = Drawn.INDEPENDENT if self._sampled else Drawn.DETERMINISTIC
        tree = TokenTree.chain(ids[-1], drafted, drawn, draft_probs)
        return replace(tree, evidence=evidence) if self._stop > 0 else tree

    def _next(
        self, ids: Sequence[int], logits: torch.Tensor, draft_probs: list[torch.Tensor]
    ) -> tuple[int, float] | None:
        """The next draft token and the draft's probability of it (1 if nobody asks).

        None where the draft has no distribution: its logits are NaN, or all are masked.
        """
        if self._sampling.greedy:
            # Under the controls: a repetition penalty moves the argmax.
            token = self._sampling.likeliest(ids, logits)
            if not math.isfinite(float(logits[token])):
                return None
            if self._stop == 0:
                return token, 1.0
            confidence = float(logits.float().softmax(-1)[token])
            return None if math.isnan(confidence) else (token, confidence)
        probs = self._sampling.probs(ids, logits / self._temperature)
        if math.isnan(float(probs[0])):
            return None
        if self._sampled:
            draft_probs.append(probs)
            [token] = self._sampling.draw(probs)
        else:
            token = self._sampling.coupled(probs, len(ids))
        return token, float(probs[token]) if self._stop > 0 else 1.0


def _evidence(depth: int, confidence: float) -> int:
    return (min(depth, DEEPEST) - 1) * BINS + min(int(confidence * BINS), BINS - 1)
