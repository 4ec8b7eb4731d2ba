"""Transformers' iterators over text, for readers that may stop before the end.

Of transformers' own, generation doesn't learn that nobody reads any more: it decodes to
the end. Here it stops with the next tokens that are accepted.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer


class ReaderGone(Exception):
    """Raised by ``put`` when the reader has stopped."""


class _Closable:
    """What both share, before transformers' own class in their bases.

    One generation after another may use it, as transformers' own.
    """

    text_queue: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock = threading.Lock()
        self._closed = False
        self._prompted = False
        self._ended = False  # the latest generation, and none has begun since
        self._loops = 0  # over the pieces

    def close(self) -> None:
        """Say that nothing more is read of a generation: a loop gets what is there."""
        with self._lock:
            if not self._ended:
                self._closed = True
            elif not self._loops:
                self._forget()

    def put(self, value: torch.Tensor) -> None:
        """Add the prompt, which ``generate`` gives first, or tokens behind it.

        Raises:
            ReaderGone: when it was closed, for tokens behind the prompt.
        """
        with self._lock:
            if self._closed and self._prompted:
                raise ReaderGone("nobody reads the streamer any more; make a new one")
            self._prompted, self._ended = True, False
        super().put(value)  # type: ignore[misc]

    def end(self) -> None:
        """Add the rest, and begin anew with the next prompt."""
        with self._lock:
            super().end()  # type: ignore[misc]
            if self._closed and not self._loops:
                self._forget()
            self._closed = self._prompted = False
            self._ended = True

    def _forget(self) -> None:
        """Pieces that nobody reads aren't those of the next generation."""
        self.text_queue = type(self.text_queue)()

    @contextmanager
    def _loop(self) -> Iterator[None]:
        """Count a loop over the pieces, and close where it is left before the end."""
        with self._lock:
            self._loops += 1
        left = True
        try:
            yield
            left = False
        finally:
            with self._lock:
                self._loops -= 1
            if left:
                self.close()


class ClosableStreamer(_Closable, TextIteratorStreamer):
    """Pieces of text; leaving the loop over them, or ``close``, ends generation.

    Arguments are those of :class:`~transformers.TextIteratorStreamer`.
    """

    def __iter__(self) -> Iterator[str]:
        """The pieces, as they come."""
        with self._loop():
            while (piece := next(self, None)) is not None:
                yield piece


class AsyncClosableStreamer(_Closable, AsyncTextIteratorStreamer):
    """The same for ``async for``.

    Arguments are those of :class:`~transformers.AsyncTextIteratorStreamer`.
    """

    async def __aiter__(self) -> AsyncIterator[str]:
        """The pieces, as they come."""
        with self._loop():
            while (piece := await anext(self, None)) is not None:
                yield piece
