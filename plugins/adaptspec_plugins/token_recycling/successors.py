"""The table of likeliest next tokens that token recycling drafts from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from adaptspec.acceleration.top_tokens import SHARES
from adaptspec.knowledge import KnowledgeWarning

WIDEST = 32  # columns; bounds what a stored table may hold
LARGEST = 1 << 22  # vocabulary; the same
TYPES = {
    "vocab_size": torch.int32,
    "tokens": torch.int32,
    "successors": torch.int32,
    "levels": torch.uint8,
}


class Successors:
    """For each token the likeliest tokens after it, as last seen, and how sure.

    ``(4 * width + 2) * vocab_size`` bytes, whatever it learns.

    Args:
        vocab_size: Rows.
        width: Columns: successors kept of a token, likeliest first. -1 stands where
            there is none.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        self._table = np.full((vocab_size, width), -1, dtype=np.int32)
        self._levels = np.zeros(vocab_size, dtype=np.uint8)
        self._changed = np.zeros(vocab_size, dtype=np.bool_)

    @property
    def vocab_size(self) -> int:
        """Tokens there are rows for."""
        return len(self._table)

    @property
    def width(self) -> int:
        """Most successors of a token."""
        return int(self._table.shape[1])

    def __len__(self) -> int:
        """Tokens with successors."""
        return int(np.count_nonzero(self._table[:, 0] >= 0))

    def __contains__(self, token: int) -> bool:
        """Whether ``token`` has successors."""
        return bool(self._table[token, 0] >= 0)

    def after(self, token: int) -> list[int]:
        """Successors of ``token``, likeliest first, padded with -1 to the width."""
        row: list[int] = self._table[token].tolist()
        return row

    def level(self, token: int) -> int:
        """How sure the first successor of ``token`` was: 0 to ``len(SHARES)``."""
        return int(self._levels[token])

    def learn(
        self, tokens: Sequence[int], successors: torch.Tensor, levels: torch.Tensor
    ) -> None:
        """Replace the rows of distinct ``tokens`` by ``successors [n, any width]``."""
        # In one piece: each transfer from a GPU waits for it.
        both = torch.cat([successors[:, : self.width], levels[:, None]], 1)
        found = both.cpu().numpy()
        self._table[tokens, : found.shape[1] - 1] = found[:, :-1]
        self._levels[tokens] = found[:, -1]
        self._changed[tokens] = True

    def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        """Everything known here and in ``stored``, which :func:`problem` has passed.

        Rows learnt here since the last call win over stored ones; those win over the
        others here. A stored row keeps its width unless it is replaced.
        """
        if stored:
            theirs = stored["tokens"].numpy()
            kept = ~self._changed[theirs]
            theirs, rows = theirs[kept], stored["successors"].numpy()[kept]
            width = min(self.width, rows.shape[1])
            self._table[theirs] = -1
            self._table[theirs, :width] = rows[:, :width]
            self._levels[theirs] = stored["levels"].numpy()[kept]
        tokens = np.flatnonzero(self._table[:, 0] >= 0)
        successors = self._table[tokens]
        if stored and rows.shape[1] > self.width:
            more = rows.shape[1] - self.width
            successors = np.pad(successors, ((0, 0), (0, more)), constant_values=-1)
            successors[np.searchsorted(tokens, theirs)] = rows
        self._changed[:] = False
        return {
            "vocab_size": torch.tensor(self.vocab_size, dtype=torch.int32),
            "tokens": torch.from_numpy(tokens.astype(np.int32)),
            "successors": torch.from_numpy(successors),
            "levels": torch.from_numpy(self._levels[tokens]),
        }


def problem(stored: Mapping[str, torch.Tensor], vocab_size: int | None) -> str | None:
    """Why ``stored`` isn't a table of ``vocab_size`` tokens (None: any), or None.

    Siblings of a draft must differ and be ids of the model, so neither is taken on
    trust.
    """
    if set(stored) != set(TYPES):
        return f"tensors {sorted(TYPES)} expected, got {sorted(stored)}"
    for name, dtype in TYPES.items():
        if stored[name].dtype is not dtype:
            return f"{name} must be {dtype}, got {stored[name].dtype}"
    size, tokens, successors, levels = (stored[name] for name in TYPES)
    if size.dim() != 0 or not 1 <= int(size) <= LARGEST:
        return f"vocab_size must be one number in 1..{LARGEST}, got {size.tolist()}"
    vocabulary = int(size)
    if vocab_size is not None and vocabulary != vocab_size:
        return f"vocab_size must be the model's {vocab_size}, got {vocabulary}"
    shape = tuple(successors.shape)
    count = tokens.numel()
    if (
        shape[:1] != (count,)
        or len(shape) != 2
        or {tokens.shape, levels.shape} != {(count,)}
    ):
        return (
            "tokens [n], levels [n] and successors [n, k] expected, "
            f"got {list(tokens.shape)}, {list(levels.shape)} and {list(shape)}"
        )
    if not 1 <= shape[1] <= WIDEST:
        return f"successors must have 1..{WIDEST} columns, got {shape[1]}"
    if not count:
        return None
    if int(levels.max()) > len(SHARES):
        return f"levels must be in 0..{len(SHARES)}, got {int(levels.max())}"
    if not bool((tokens.diff() > 0).all()):
        return "tokens must ascend"
    if int(tokens[0]) < 0 or int(tokens[-1]) >= vocabulary:
        return (
            f"tokens must be in 0..{vocabulary - 1}, "
            f"got {int(tokens[0])}..{int(tokens[-1])}"
        )
    low, high = int(successors.min()), int(successors.max())
    if low < -1 or high >= vocabulary:
        return f"successors must be in -1..{vocabulary - 1}, got {low}..{high}"
    missing = successors < 0
    if bool(missing[:, 0].any()) or bool((missing[:, :-1] & ~missing[:, 1:]).any()):
        return "a token's successors must come before the -1s that pad them"
    ordered = successors.sort(1).values
    if bool(((ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)).any()):
        return "a token's successors must be distinct"
    return None


def refuse(owner: str, reason: str) -> None:
    """Warn that stored knowledge isn't used."""
    warnings.warn(
        f"{owner}: stored knowledge is not used and will be replaced: {reason}",
        KnowledgeWarning,
        stacklevel=4,
    )
