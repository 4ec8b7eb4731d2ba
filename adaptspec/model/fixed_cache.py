"""Keys and values in buffers whose addresses stay, as captured graphs need them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from adaptspec.model.cache import TreeCache, TreeLayer
from adaptspec.model.forward import Forward

# Keys and values of a layer, None for one that keeps none of its own.
Buffers = tuple[torch.Tensor, torch.Tensor] | None


@dataclass
class SlotSet:
    """The buffers of one sequence at a time, and what was captured over them.

    Args:
        capacity: Slots in each layer.
        buffers: Of each layer, ``[1, heads, capacity, head_dim]``.
    """

    capacity: int
    buffers: Sequence[Buffers]
    graphs: dict[Any, Any] = field(default_factory=dict)
    _owner: Callable[[], Any] = field(default=lambda: None)

    @classmethod
    @torch.inference_mode()
    def like(cls, layers: Sequence[Buffers], capacity: int) -> SlotSet:
        """Empty buffers for layers whose keys and values look like ``layers``."""

        def made(rows: torch.Tensor) -> torch.Tensor:
            return rows.new_zeros((*rows.shape[:2], capacity, rows.shape[3]))

        return cls(
            capacity,
            [None if one is None else (made(one[0]), made(one[1])) for one in layers],
        )

    @property
    def free(self) -> bool:
        """Whether no living cache uses it."""
        return self._owner() is None

    @torch.inference_mode()
    def lend(self, cache: FixedCache) -> None:
        """Let ``cache`` use it; what others left there is forgotten.

        Masked slots are multiplied by zero, so none may hold what isn't a number.
        """
        self._owner = weakref.ref(cache)
        self.clear(0)

    @torch.inference_mode()
    def clear(self, first: int) -> None:
        """Write zeros to the slots from ``first`` on."""
        for one in self.buffers:
            for buffer in one or ():
                buffer[:, :, first:].zero_()

    def give_back(self) -> None:
        """Free it."""
        self._owner = lambda: None


class FixedLayer(TreeLayer):  # type: ignore[no-untyped-call]
    """A :class:`TreeLayer` in buffers of a :class:`SlotSet`.

    While ``slots [rows]`` is set, new rows go to those slots and all slots are
    returned, whose mask then says which of them are seen: nothing depends on a number
    that Python knows. Else it is a ``TreeLayer`` that needs no more room.
    """

    def __init__(self, buffers: Buffers) -> None:
        super().__init__()
        self.slots: torch.Tensor | None = None
        if buffers is not None:
            self.use(buffers)

    def use(self, buffers: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Keep rows in ``buffers`` from now on."""
        self.keys, self.values = buffers
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[1, heads, rows, head_dim]``; return what can be attended to."""
        if self.slots is None:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.slots, key_states)
        self.values.index_copy_(2, self.slots, value_states)
        return self.keys, self.values


class FixedCache(TreeCache):
    """A cache in the buffers of a :class:`SlotSet`, which it holds while it lives.

    Args:
        larger: Gives a set with room for so many rows; None: there is none.
    """

    def __init__(self, slots: SlotSet, larger: Callable[[int], SlotSet | None]) -> None:
        layers = [FixedLayer(buffers) for buffers in slots.buffers]
        Cache.__init__(self, layers=list(layers))
        self.rows = list(layers)
        self._fixed, self._larger = layers, larger
        self.set = slots
        self.last: Forward | None = None  # of fixed width, behind these rows
        slots.lend(self)

    @property
    def intact(self) -> bool:
        """Whether its rows are still in the buffers of its set."""
        return all(
            buffers is None or layer.keys is buffers[0]
            for layer, buffers in zip(self._fixed, self.set.buffers, strict=True)
        )

    @torch.inference_mode()
    def announce(self, length: int) -> None:
        """Move to a larger set if ``length`` rows don't fit."""
        super().announce(length)
        if length <= self.set.capacity or not self.intact:
            return
        larger = self._larger(length)
        if larger is None:  # it grows on its own from here on
            return
        larger.lend(self)
        kept = self.length
        for layer, new in zip(self._fixed, larger.buffers, strict=True):
            if new is None:
                continue
            assert layer.keys is not None
            assert layer.values is not None
            new[0][:, :, :kept] = layer.keys[:, :, :kept]
            new[1][:, :, :kept] = layer.values[:, :, :kept]
            layer.use(new)
        self.set.give_back()
        self.set = larger

    def write_to(self, slots: torch.Tensor | None) -> None:
        """Let the next rows go to ``slots``; None: behind those kept."""
        for layer in self._fixed:
            layer.slots = slots

    def hold(self, length: int) -> None:
        """Say that the first ``length`` slots are written."""
        for layer in self._fixed:
            if layer.is_initialized:
                layer.length = length
