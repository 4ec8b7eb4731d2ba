"""The result of a forward pass, and the model's protocol for probes and timers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch

from adaptspec.acceleration.argmax import argmax_rows

if TYPE_CHECKING:
    from torch import nn

    from adaptspec.model.cache import TreeCache
    from adaptspec.token_tree import TokenTree

Level = Literal["tree", "chain", "plain"]


@dataclass(frozen=True)
class Capability:
    """What the model's forward can verify: token trees, chains, or nothing.

    Args:
        reason: Why it isn't more.
        uncached: No cache gives what the model's own ``generate`` does, so every step
            reads the whole text.
    """

    level: Level
    reason: str = ""
    uncached: bool = False


@dataclass(frozen=True)
class Forward:
    """What a forward pass gave: ``logits[rows[i]]`` are those after node ``i``."""

    logits: torch.Tensor  # [rows, vocab]
    rows: dict[int, int]
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [nodes, h]
    # What `rank` gives, where it was computed with the logits.
    ranked: torch.Tensor | None = field(default=None, kw_only=True)
    # Whether ``best`` is what decoding chose, whatever the controls (a recording).
    decided: ClassVar[bool] = False

    @functools.cached_property
    def best(self) -> Sequence[int]:
        """The likeliest token of each row; of equals, the first."""
        if self.logits.device.type == "cpu":
            return argmax_rows(self.logits)
        return [int(token) for token in self._read[0]]

    def largest(self, rows: Sequence[int]) -> list[float]:
        """The largest logit of each of ``rows``, NaN if any of the row is."""
        if self.logits.device.type == "cpu":
            found: list[float] = torch.stack(
                [self.logits[row].amax() for row in rows]
            ).tolist()
            return found
        return [self._read[1][row] for row in rows]

    @property
    def finite(self) -> bool:
        """Whether no row's largest logit is NaN or infinite."""
        return all(map(math.isfinite, self.largest(range(len(self.logits)))))

    def rank(self) -> torch.Tensor:
        """Likeliest token and largest logit of each row, ``[2, rows]``, on its device.

        Double precision holds both as they are.
        """
        best, largest = self.logits.argmax(-1), self.logits.amax(-1)
        return torch.stack([best.double(), largest.double()])

    @functools.cached_property
    def _read(self) -> list[list[float]]:
        """What :meth:`rank` gives: all that a greedy step reads of the device."""
        read: list[list[float]] = (
            self.rank() if self.ranked is None else self.ranked
        ).tolist()
        return read


@dataclass
class PlainCache:
    """The model's own cache, only ever appended to, and how many tokens it has seen.

    Args:
        text: The tokens seen, for a model that reads them again at each step.
    """

    inner: Any
    length: int = 0
    text: list[int] | None = None


class TextModel(Protocol):
    """A language model as those see it who turn text into token ids."""

    name: str
    tokenizer: Any
    config: Any
    generation_config: Any
    vocab_size: int

    @property
    def input_size(self) -> int:
        """How many token ids the model can read."""


class ForwardModel(Protocol):
    """A language model as those see it who probe or time its forward passes.

    ``adaptspec.model.language_model.LanguageModel`` is one, and says what they do.
    """

    name: str
    config: Any
    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    parameter_count: int
    use_masks: bool
    takes_positions: bool
    cache_argument: str

    @property
    def max_length(self) -> int | None:
        """Most positions the model was made for."""

    @property
    def unverifiable(self) -> str | None:
        """Why passes over drafts aren't what the model gives without, or None."""

    def over(self, module: nn.Module) -> ForwardModel:
        """The same kind of model over another module, run as it is."""

    def new_cache(self, capacity: int = 0) -> TreeCache:
        """An empty cache."""

    def plain_cache(self, uncached: bool | None = None) -> PlainCache:
        """The model's own cache."""

    def evaluate(self, **arguments: Any) -> Any:
        """The module's forward."""

    def prefill(
        self,
        tokens: Sequence[int],
        cache: TreeCache | PlainCache,
        *,
        last: int = 1,
        hidden_layers: Sequence[int] = (),
    ) -> Forward:
        """Append successive tokens."""

    def forward_tree(
        self, tree: TokenTree, cache: TreeCache, *, hidden_layers: Sequence[int] = ()
    ) -> Forward:
        """Append a tree's nodes."""
