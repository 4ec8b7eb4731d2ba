"""What a request comes to: all at once, or as pieces of text while it is decoded."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from adaptspec.decoding.engine import Engine, Finish, Generation, Run
from adaptspec.decoding.stats import RunStats
from adaptspec.selector import Choice
from adaptspec.shadow import Shadow
from adaptspec.streaming.stop_text import StopText
from adaptspec.streaming.text_pieces import TextPieces
from adaptspec.turns import Turns, take_all

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Result:
    """What was generated, with what, and how it went.

    ``text`` is that of ``token_ids`` without special tokens. Where a stop string ended
    it, that and what its last token brought behind it are left out unless they were
    asked for (``include_stop``); ``token_ids`` hold them either way, as with the
    model's own ``generate``.

    ``choice`` says what was expected; ``stats.tokens_per_second`` and ``stats.ratio``
    what was measured.

    Args:
        text: Of the output alone, without the prompt.
        token_ids: Of the output, the token that ended it included.
        choice: What decoded, and why.
        stats: Counts, and times in seconds.
        finish: What ended the output: ``eos``, ``stop`` (a stop string), ``length`` or
            ``time`` (``max_time``); ``unfinished`` where more would come.
        seconds_classifying: Seconds in which the prompt's class was told from its text.
        seed: Of the sampling; None where decoding was greedy and no seed was given.
        shadows: What strategies would have saved, where ``shadow=True`` asked for it.
    """

    text: str
    token_ids: list[int]
    choice: Choice
    stats: RunStats
    finish: Finish
    seconds_classifying: float = 0.0
    seed: int | None = None
    shadows: Sequence[Shadow] = ()


class Stream(Iterator[str], AsyncIterator[str]):
    """Pieces of text as soon as they are accepted; afterwards what they came to.

    Use it in a ``with`` block, or :meth:`close` it, to give it up early; a stream that
    is dropped is given up, too. An error in decoding is raised once and ends it.
    ``async for`` and ``async with`` decode in a thread, so that the event loop goes on;
    a task that is cancelled while it waits for a piece gives the stream up.

    Several threads may read and close it; each piece goes to one of them.

    Args:
        choice: What decodes.
        seconds_classifying: As in :class:`Result`.
        on_end: Called once with what was generated, when the stream has ended or was
            given up.
        stop_text: Keeps stop strings out of the text; None leaves them in.
        shadows: Tells what strategies would have saved, once all is generated.
    """

    def __init__(
        self,
        engine: Engine,
        run: Run,
        choice: Choice,
        seconds_classifying: float,
        on_end: Callable[[Generation], None] | None = None,
        stop_text: StopText | None = None,
        shadows: Callable[[Generation], Sequence[Shadow]] | None = None,
    ) -> None:
        self.choice, self.seconds_classifying = choice, seconds_classifying
        self._engine, self._model, self._stop_text = engine, engine.model, stop_text
        self._shadows: Sequence[Shadow] = ()
        self._shadows_of = shadows
        # What is to be called, once it has ended.
        self._on_end = [] if on_end is None else [on_end]
        self._run: Run | None = run
        self._steps = iter(run)
        self._unread: list[int] = []  # tokens that no piece has been made of
        certain = None if stop_text is None else stop_text.certain
        self._pieces = TextPieces(self._model.tokenizer, certain)
        self._generation = run.result

    def __next__(self) -> str:
        """The next piece."""
        while (piece := self._in_turn(self._advance)) is not None:
            if piece:
                return piece
        raise StopIteration

    def next_tokens(self) -> list[int]:
        """Decode one step in place of reading pieces: its tokens, none at the end."""
        read = len(self._unread)
        self._step()
        return self._unread[read:]

    @property
    def ended(self) -> bool:
        """Whether no more tokens come."""
        return self._run is None or self._run.ended

    def finish(self) -> None:
        """Decode to the end in place of reading pieces; they can be read afterwards."""
        while self._in_turn(self._step):
            pass

    def close(self) -> None:
        """Give it up: nothing more is decoded, and the cache is freed.

        A step that another thread is at comes to its end first. What was decoded stays
        in :attr:`result` and can be read as pieces. Closing an ended stream does
        nothing.
        """
        self._in_turn(self._give_up)

    def __enter__(self) -> Stream:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def __aiter__(self) -> Stream:
        """Itself."""
        return self

    async def __anext__(self) -> str:
        """The next piece, decoded by another thread step by step."""
        while (piece := await self._off_the_loop(self._advance)) is not None:
            if piece:
                return piece
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """:meth:`close` without keeping the event loop waiting."""
        await self._off_the_loop(self._give_up)

    async def __aenter__(self) -> Stream:
        """Itself."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close it."""
        await self.aclose()

    def __del__(self) -> None:
        """Close it, if it was made at all; wait for nobody."""
        if "_generation" in self.__dict__ and not sys.is_finalizing():
            self._close_soon()

    @property
    def result(self) -> Result:
        """All of it, or what there is so far; ``finish`` says which.

        ``finish`` is ``unfinished`` until the last token is decoded, and stays so if
        the stream was given up.
        """
        ended = self._run is None and self._generation.finish != "unfinished"
        if ended and self._shadows_of is not None:
            self._shadows = self._shadows_of(self._generation)
            self._shadows_of = None
        return self._turns.take(self._so_far)

    @property
    def _turns(self) -> Turns:
        return self._model.turns

    @property
    def _finish(self) -> Finish:
        return self._generation.finish if self._run is None else self._run.finish

    def _so_far(self) -> Result:
        generation = self._generation if self._run is None else self._run.result
        if generation.finish == "stop" and self._stop_text is not None:
            text = self._stop_text.before(generation.token_ids)
        else:
            text = self._model.decode(generation.token_ids)
        return Result(
            text=text,
            token_ids=generation.token_ids,
            choice=self.choice,
            stats=generation.stats,
            finish=generation.finish,
            seconds_classifying=self.seconds_classifying,
            seed=generation.seed,
            shadows=tuple(self._shadows),
        )

    def _in_turn(self, step: Callable[[], Answer]) -> Answer:
        """Run ``step`` while no other thread is at one; then tell, if it was the last.

        What is told may write files, which others needn't wait for.
        """
        try:
            return take_all(self._engine.turns, step)
        finally:
            self._tell_end()

    async def _off_the_loop(self, step: Callable[[], Answer]) -> Answer:
        """The same in a thread. Whoever is cancelled meanwhile gives the stream up."""
        # The worker may look at its last task a little longer than the task takes: it
        # must not keep alive a stream that has been dropped meanwhile.
        steps = [partial(self._in_turn, step)]
        call = partial(copy_context().run, lambda: steps.pop()())
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._turns.worker, call)
        except asyncio.CancelledError:
            self._close_soon()
            raise

    def _close_soon(self) -> None:
        """Give it up when no step runs, without waiting for one."""
        self._turns.soon(self._give_up)
        self._turns.soon(self._tell_end)

    def _advance(self) -> str | None:
        """Decode a step: what can be shown now, or None where nothing is left."""
        if self._step():
            if self._stop_text is not None and self._finish == "stop":
                return ""  # what a stop string ended is known as a whole only
            unread, self._unread = self._unread, []
            return self._pieces.add(unread)
        return self._pieces.rest(self._so_far().text) or None

    def _step(self) -> bool:
        """Decode one step; False if there is none left."""
        if self._run is None:
            return False
        try:
            tokens = next(self._steps, None)
        except BaseException:
            self._give_up()
            raise
        if tokens is None:
            self._give_up()
            return False
        self._unread += tokens
        return True

    def _give_up(self) -> None:
        """Free what decodes; what was generated stays."""
        if self._run is None:
            return
        try:
            self._steps.close()
        finally:
            self._generation, self._run = self._run.result, None

    def _tell_end(self) -> None:
        """Say once what was generated, if it has ended."""
        if self._run is None and self._on_end:
            try:
                on_end = self._on_end.pop()  # by one thread only
            except IndexError:
                return
            on_end(self._generation)
