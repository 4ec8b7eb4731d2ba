"""Attention masks and positions of a token tree behind cached rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaptspec.token_tree import TokenTree

SLIDING_TYPES = ("sliding_attention",)
CHUNKED_TYPES = ("chunked_attention",)


@dataclass(frozen=True)
class Reach:
    """How far back a kind of layer attends, by position (None: to the start)."""

    window: int | None = None
    chunk: int | None = None

    def limits(self, length: int) -> bool:
        """Whether any of ``length`` positions is out of some other's reach."""
        return any(
            size is not None and size < length for size in (self.window, self.chunk)
        )


def layer_reaches(config: Any) -> dict[str, Reach]:
    """Layer type -> reach; one entry under ``full_attention`` for uniform models.

    Raises:
        ValueError: naming a layer type whose mask isn't known.
    """
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if types is None:
        if getattr(config, "use_sliding_window", True) is False:
            window = None
        return {"full_attention": Reach(window=window)}
    reaches = {}
    for kind in sorted(set(types)):
        if kind == "full_attention":
            reaches[kind] = Reach()
        elif kind in SLIDING_TYPES:
            reaches[kind] = Reach(window=window)
        elif kind in CHUNKED_TYPES:
            reaches[kind] = Reach(chunk=chunk)
        else:
            raise ValueError(f"no tree mask for layers of type {kind!r}")
    return reaches


def tree_mask(
    tree: TokenTree,
    cached: int,
    reach: Reach,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Additive mask ``[1, 1, nodes, cached + nodes]``: 0 to attend, else dtype's min.

    A node attends to the cached rows, its ancestors and itself, within ``reach`` of its
    position ``cached + depth``.
    """
    nodes = len(tree)
    mask = torch.full((nodes, cached + nodes), torch.finfo(dtype).min, dtype=dtype)
    if reach.limits(cached + max(tree.depths) + 1):
        for node, depth in enumerate(tree.depths):
            mask[node, first_key(cached + depth, reach) : cached] = 0
    else:
        mask[:, :cached] = 0
    mask[:, cached:].masked_fill_(seen_nodes(tree, cached, reach), 0)
    return mask[None, None].to(device)


def seen_nodes(tree: TokenTree, cached: int, reach: Reach) -> torch.Tensor:
    """Which nodes each node attends to: ``[nodes, nodes]``, its ancestors and itself
    within ``reach``."""
    nodes = len(tree)
    if tree.is_chain:
        block = torch.ones((nodes, nodes), dtype=torch.bool).tril()
    else:
        block = torch.eye(nodes, dtype=torch.bool)
        for node in range(1, nodes):
            block[node, :node] |= block[tree.parents[node], :node]
    if reach.limits(cached + max(tree.depths) + 1):
        block &= _pairs(torch.tensor(tree.depths) + cached, reach)
    return block


def causal_mask(
    new: int, cached: int, reach: Reach, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The same for ``new`` successive tokens, as a prompt is read.

    Nothing else of its size is built: a mask is what a long prompt takes most room for.
    """
    mask = torch.full((new, cached + new), torch.finfo(dtype).min, dtype=dtype)
    for row, position in enumerate(range(cached, cached + new)):
        mask[row, first_key(position, reach) : position + 1] = 0
    return mask[None, None].to(device)


def positions(depths: Sequence[int], cached: int, device: torch.device) -> torch.Tensor:
    """Position ids ``[1, nodes]`` of nodes at ``depths`` behind ``cached`` rows."""
    return torch.tensor([[cached + depth for depth in depths]], device=device)


def first_key(position: int, reach: Reach) -> int:
    """The first position that a token at ``position`` attends to."""
    first = 0
    if reach.window is not None:
        first = position - reach.window + 1
    if reach.chunk is not None:
        first = max(first, position // reach.chunk * reach.chunk)
    return max(first, 0)


def _pairs(places: torch.Tensor, reach: Reach) -> torch.Tensor:
    """Which of the tokens at ``places`` are in reach of which: ``[tokens, tokens]``."""
    near = torch.ones((len(places), len(places)), dtype=torch.bool)
    if reach.window is not None:
        near &= places[:, None] - places[None, :] < reach.window
    if reach.chunk is not None:
        near &= places[:, None] // reach.chunk == places[None, :] // reach.chunk
    return near
