"""Whether two tokens are so close that rounding decides between them."""

from __future__ import annotations

import torch


def near_tie(
    logits: torch.Tensor, one: int, other: int, dtype: torch.dtype, units: int = 4
) -> bool:
    """Whether two tokens' logits ``[vocab]`` differ by no more than ``dtype`` rounds.

    Args:
        units: Of the last place of the larger one: rounding passes through every layer.
    """
    first, second = float(logits[one]), float(logits[other])
    size = max(abs(first), abs(second))
    return abs(first - second) <= units * torch.finfo(dtype).eps * size
