"""Preallocated key/value cache that appends without copying and keeps any path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

# Rows made room for beyond those needed: so many, or a quarter of them.
GROWTH_ROWS = 256


class TreeLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One attention layer's rows, in buffers ``[batch, heads, capacity, head_dim]``.

    ``update`` writes the new rows behind the kept ones and returns views; keeping a
    path moves rows only where it isn't already a prefix. Every row is kept whatever the
    layer's window, which the attention mask applies by position.

    Args:
        capacity: Rows expected at most. Buffers grow as rows come, by a quarter at a
            time, and beyond this only when they must.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.announced = 0
        self.length = 0

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> None:
        """Allocate the buffers; keys and values may differ in head size."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows = self._room(key_states.shape[2])
        self.keys = key_states.new_empty(
            (*key_states.shape[:2], rows, key_states.shape[3])
        )
        self.values = value_states.new_empty(
            (*value_states.shape[:2], rows, value_states.shape[3])
        )
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[batch, heads, rows, head_dim]``; return views of all rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.reserve(key_states.shape[2])
        end = self.length + key_states.shape[2]
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def reserve(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers, with room for ``rows`` behind those kept."""
        assert self.keys is not None
        assert self.values is not None
        end = self.length + rows
        if end > self.keys.shape[2]:
            self.keys = self._grown(self.keys, end)
            self.values = self._grown(self.values, end)
        return self.keys, self.values

    def keep(self, base: int, rows: torch.Tensor | None, count: int) -> None:
        """Of the rows from ``base`` on, keep ``rows`` (None: the first ``count``)."""
        if rows is not None and self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            for buffer in (self.keys, self.values):
                # index_select copies first, so overlapping rows are safe.
                buffer[:, :, base : base + count] = buffer.index_select(2, rows)
        self.length = base + count

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` rows (transformers' convention)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count, got {tokens_to_remove}")
        self.length += tokens_to_remove

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset of the default mask."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Rows kept."""
        return self.length

    def get_max_length(self) -> int:
        """No limit: the buffers grow."""
        return -1

    def reset(self) -> None:
        """Forget all rows, keep the buffers."""
        self.length = 0

    def _room(self, needed: int) -> int:
        """Rows to allocate where ``needed`` must fit."""
        needed = max(needed, self.announced)
        room = needed + max(GROWTH_ROWS, needed // 4)
        return min(room, self.capacity) if needed <= self.capacity else room

    def _grown(self, buffer: torch.Tensor, rows: int) -> torch.Tensor:
        grown = buffer.new_empty((*buffer.shape[:2], self._room(rows), buffer.shape[3]))
        grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown


class TreeCache(Cache):
    """A cache of :class:`TreeLayer`, for sequences of batch size one.

    Args:
        layers: How many attention layers the model has.
        capacity: Rows expected at most, as in :class:`TreeLayer`.
    """

    def __init__(self, layers: int, capacity: int = 0) -> None:
        self.rows = [TreeLayer(capacity) for _ in range(layers)]
        super().__init__(layers=list(self.rows))

    @property
    def length(self) -> int:
        """Rows kept in the first layer."""
        return self.rows[0].length if self.rows else 0

    @torch.inference_mode()
    def keep(self, base: int, nodes: Sequence[int]) -> None:
        """Of the rows appended since ``base`` keep ``nodes``, ascending, in order.

        Nothing is copied when ``nodes`` is a prefix ``0, 1, 2...``.
        """
        rows = None
        if any(node != i for i, node in enumerate(nodes)):
            device = self.rows[0].device
            rows = torch.tensor([base + node for node in nodes], device=device)
        for layer in self.rows:
            layer.keep(base, rows, len(nodes))

    def announce(self, length: int) -> None:
        """Say that ``length`` rows are coming, so that buffers grow once for all."""
        for layer in self.rows:
            layer.announced = length

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` rows."""
        if length > self.length:
            raise ValueError(f"length <= {self.length} must hold, got {length}")
        for layer in self.rows:
            layer.length = min(layer.length, length)

    @torch.inference_mode()
    def repeat(self, length: int) -> None:
        """Fill up to ``length`` rows with copies of those there, for timing only."""
        self.announce(length)
        for layer in self.rows:
            if not layer.is_initialized:
                continue
            assert layer.keys is not None
            assert layer.values is not None
            count = layer.length
            rows = torch.arange(count, length, device=layer.device) % count
            keys, values = layer.keys, layer.values
            layer.update(keys.index_select(2, rows), values.index_select(2, rows))
