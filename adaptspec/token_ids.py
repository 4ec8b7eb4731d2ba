"""Token ids that grow at their end, as a sequence and as a tensor, without copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch


class Continuation(Sequence[int]):
    """``tokens`` behind ``ids``; neither is copied.

    Args:
        ids: What comes first. It may grow later; this sequence doesn't.
        tokens: The few that follow.
    """

    def __init__(self, ids: Sequence[int], tokens: Sequence[int]) -> None:
        self.ids, self.tokens = ids, tuple(tokens)
        self.split = len(ids)

    def __len__(self) -> int:
        return self.split + len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            first, end, step = index.indices(len(self))
            return [self[at] for at in range(first, end, step)]
        at = index if index >= 0 else index + len(self)
        if not 0 <= at < len(self):
            raise IndexError(f"no token {index} among {len(self)}")
        return self.ids[at] if at < self.split else self.tokens[at - self.split]


class GrowingTensor:
    """The ids of one sequence as a tensor; what is new is written behind what is there.

    Asked with a :class:`Continuation` each time, of one list that is only appended to,
    it writes the new tokens alone. Any other sequence is copied whole.

    Args:
        before: Ids that come first in every tensor.
    """

    def __init__(self, device: torch.device, before: Sequence[int] = ()) -> None:
        self._device, self._before = device, list(before)
        self._held: Sequence[int] | None = None  # whose beginning the buffer holds
        self._count = 0
        self._buffer = torch.empty(0, dtype=torch.long, device=device)

    def of(self, ids: Sequence[int]) -> torch.Tensor:
        """``[1, length]`` of ``before`` and ``ids``.

        It keeps its values while each later call has ``ids`` at its beginning.
        """
        if not isinstance(ids, Continuation):
            whole = [[*self._before, *ids]]
            return torch.tensor(whole, dtype=torch.long, device=self._device)
        first = len(self._before)
        if ids.ids is not self._held:
            self._held, self._count = ids.ids, 0
        if first + len(ids) > len(self._buffer):
            # Ordinary tensors may be written to in any mode, those of inference not.
            with torch.inference_mode(False):
                larger = torch.empty(
                    2 * (first + len(ids)), dtype=torch.long, device=self._device
                )
            kept = first + self._count if self._count else 0
            larger[:kept] = self._buffer[:kept]
            self._buffer = larger
        if self._count == 0:
            self._write(0, self._before)
        self._count = min(self._count, ids.split)
        self._write(first + self._count, ids.ids[self._count : ids.split])
        self._count = ids.split
        self._write(first + ids.split, ids.tokens)
        return self._buffer[None, : first + len(ids)]

    def _write(self, at: int, tokens: Sequence[int]) -> None:
        if tokens:
            new = torch.tensor(list(tokens), dtype=torch.long)
            self._buffer[at : at + len(tokens)] = new.to(self._device)
