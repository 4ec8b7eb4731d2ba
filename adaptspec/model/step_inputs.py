"""What a forward of fixed width reads, in buffers that are never replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adaptspec.model.masks import Reach, first_key, seen_nodes
from adaptspec.token_tree import TokenTree

WORD = 8  # bytes of an id, a position, a slot


class StepInputs:
    """Ids, positions, slots and sight of ``width`` rows, copied to the device at once.

    Rows that a tree leaves over repeat its root: they compute what the root does, in
    slots that nobody reads.

    Args:
        span: Nodes of a tree at most, rows left over included.
        reaches: How far layers attend, by their kind.
        dtype: Of the masks.
    """

    def __init__(
        self,
        width: int,
        span: int,
        reaches: Mapping[str, Reach],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.width, self.span = width, span
        self._reaches, self._dtype = dict(reaches), dtype
        kinds = len(self._reaches)
        words = (3 + kinds) * width + 1
        size = WORD * words + kinds * width * span
        cuda = device.type == "cuda"
        with torch.inference_mode(False):
            self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=cuda)
            self._there = (
                torch.zeros(size, dtype=torch.uint8, device=device)
                if cuda
                else self._host
            )
            self._columns = torch.arange(span, device=device)
        self._words, self._blocks = self._parts(self._host, words)
        there, self._seen = self._parts(self._there, words)
        self.ids = there[:width].view(1, width)
        self.positions = there[width : 2 * width].view(1, width)
        self.slots = there[2 * width : 3 * width]
        self._cached = there[3 * width : 3 * width + 1]
        self._firsts = there[3 * width + 1 :].view(kinds, width)
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    def fill(self, tree: TokenTree, cached: int, done: int = 0) -> None:
        """Take the nodes of ``tree`` from ``done`` on, behind ``cached`` slots and the
        nodes before, which stand in the slots behind those."""
        if self._copied is not None:  # or a copy under way would take these
            self._copied.synchronize()
        width, new = self.width, len(tree) - done
        over = width - new
        places = [cached + depth for depth in tree.depths[done:]] + [cached] * over
        firsts = [
            first_key(place, reach)
            for reach in self._reaches.values()
            for place in places
        ]
        first = cached + done
        self._words.copy_(
            torch.tensor(
                [
                    *(*tree.tokens[done:], *([tree.tokens[0]] * over)),
                    *places,
                    *range(first, first + width),
                    cached,
                    *firsts,
                ]
            )
        )
        self._blocks.zero_()
        for block, reach in zip(self._blocks, self._reaches.values(), strict=True):
            block[:new, : len(tree)] = seen_nodes(tree, cached, reach)[done:]
            for row in range(new, width):
                block[row, done + row] = 1
        if self._copied is not None:
            self._there.copy_(self._host, non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self._there.device))

    def masks(self, places: torch.Tensor, columns: int | None = None) -> Any:
        """Additive masks ``[1, 1, width, slots]`` of each kind of layer, made on the
        device; of one kind, its mask alone.

        Args:
            places: ``0, 1, 2...``, one for each slot.
            columns: Nodes that there are slots for; default: as many as there may be.
        """
        columns = self.span if columns is None else columns
        behind = self._cached + self._columns[:columns]
        found = {}
        for kind, first, block in zip(
            self._reaches, self._firsts, self._seen, strict=True
        ):
            seen = (places < self._cached) & (places >= first[:, None])
            seen = seen.index_copy(1, behind, block[:, :columns].bool())
            mask = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
            mask.masked_fill_(~seen, torch.finfo(self._dtype).min)
            found[kind] = mask[None, None]
        return found if len(found) > 1 else next(iter(found.values()))

    def _parts(
        self, buffer: torch.Tensor, words: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Its whole numbers, and a byte for each row and node of each kind."""
        numbers = buffer[: WORD * words].view(torch.int64)
        shape = len(self._reaches), self.width, self.span
        return numbers, buffer[WORD * words :].view(shape)
