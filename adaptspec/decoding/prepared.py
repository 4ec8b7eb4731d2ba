"""What transformers' ``generate`` prepared for one row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StopStringCriteria


@dataclass
class Recorded:
    """Scores and logits of each emitted token, in order.

    Args:
        keep_scores: Whether scores are kept: what the processors made of the logits.
        keep_logits: Whether the logits themselves are.
    """

    keep_scores: bool = False
    keep_logits: bool = False
    scores: list[torch.Tensor] = field(default_factory=list)  # each [1, vocab]
    logits: list[torch.Tensor] = field(default_factory=list)  # each [1, vocab]

    @property
    def wanted(self) -> bool:
        """Whether anything is kept."""
        return self.keep_scores or self.keep_logits

    def add(self, logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Those of the next token, each ``[vocab]`` in float32."""
        if self.keep_scores:
            self.scores.append(scores[None].clone())
        if self.keep_logits:
            self.logits.append(logits[None].clone())


@dataclass(frozen=True)
class Prepared:
    """Processors, criteria and noise in place of those that controls ask for.

    Args:
        device: Where ids and scores are when processors and criteria see them.
        processors: All of them, the temperature's too, in order.
        criteria: Each is asked once at each emitted token, in order, and may end the
            output. They get ``ids [1, length]`` and the scores so far, or None.
        padding: Ids that processors and criteria see before those of the row.
        pick: Samples a token: probabilities ``[vocab]`` and the token's place in the
            sequence (without padding) -> id. None: the engine's own noise.
        recorded: Where scores and logits are kept.
    """

    device: torch.device
    processors: Sequence[Any] = ()
    criteria: Sequence[Any] = ()
    padding: Sequence[int] = ()
    pick: Callable[[torch.Tensor, int], int] | None = None
    recorded: Recorded = field(default_factory=Recorded)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Those that its criteria look for."""
        found = (one for one in self.criteria if isinstance(one, StopStringCriteria))
        return tuple(stop for one in found for stop in one.stop_strings)
