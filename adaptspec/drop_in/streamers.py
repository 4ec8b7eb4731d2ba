"""Transformers' iterators over text, for readers that may stop before the end.

Of transformers' own, generation doesn't learn that nobody reads any more: it decodes to
the end. Here it stops with the next tokens that are accepted.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer


class ReaderGone(Exception):
    """Raised by ``put`` when the reader has stopped."""


class _Closable:
    """What both share, before transformers' own class in their bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._closed = threading.Event()
        self._prompted = False

    def close(self) -> None:
        """Say that nothing more is read."""
        self._closed.set()

    def put(self, value: torch.Tensor) -> None:
        """Add the prompt, which ``generate`` gives first, or tokens behind it.

        Raises:
            ReaderGone: when it was closed, for tokens behind the prompt.
        """
        if self._closed.is_set() and self._prompted:
            raise ReaderGone
        self._prompted = True
        super().put(value)  # type: ignore[misc]


class ClosableStreamer(_Closable, TextIteratorStreamer):
    """Pieces of text; leaving the loop over them, or ``close``, ends generation.

    Arguments are those of :class:`~transformers.TextIteratorStreamer`.
    """

    def __iter__(self) -> Iterator[str]:
        """The pieces, as they come."""
        try:
            while (piece := next(self, None)) is not None:
                yield piece
        finally:
            self.close()


class AsyncClosableStreamer(_Closable, AsyncTextIteratorStreamer):
    """The same for ``async for``.

    Arguments are those of :class:`~transformers.AsyncTextIteratorStreamer`.
    """

    async def __aiter__(self) -> AsyncIterator[str]:
        """The pieces, as they come."""
        try:
            while (piece := await anext(self, None)) is not None:
                yield piece
        finally:
            self.close()
