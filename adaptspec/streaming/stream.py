"""What a request comes to: all at once, or as pieces of text while it is decoded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from adaptspec.decoding.engine import Finish, Generation, Run
from adaptspec.decoding.stats import RunStats
from adaptspec.model.language_model import LanguageModel
from adaptspec.selector import Choice
from adaptspec.shadow import Shadow
from adaptspec.streaming.text_pieces import TextPieces


@dataclass(frozen=True)
class Result:
    """What was generated, with what, and how it went.

    ``choice`` says what was expected; ``stats.tokens_per_second`` and ``stats.ratio``
    what was measured.
    """

    text: str
    token_ids: list[int]
    choice: Choice
    stats: RunStats
    finish: Finish
    seconds_classifying: float = 0.0  # the prompt
    seed: int | None = None  # of the sampling; None: greedy, and none was given
    shadows: Sequence[Shadow] = ()  # if asked for, what strategies would have saved


class Stream(Iterator[str]):
    """Pieces of text as soon as they are accepted; afterwards what they came to.

    Use it in a ``with`` block, or :meth:`close` it, to give it up early; a stream that
    is dropped is given up, too. An error in decoding is raised once and ends it.

    Args:
        choice: What decodes.
        seconds_classifying: As in :class:`Result`.
        on_end: Called once with what was generated, when the stream has ended or was
            given up.
    """

    def __init__(
        self,
        model: LanguageModel,
        run: Run,
        choice: Choice,
        seconds_classifying: float,
        on_end: Callable[[Generation], None] | None = None,
    ) -> None:
        self.choice, self.seconds_classifying = choice, seconds_classifying
        self.shadows: Sequence[Shadow] = ()
        self._model, self._on_end = model, on_end
        self._run: Run | None = run
        self._steps = iter(run)
        self._unread: list[int] = []  # tokens that no piece has been made of
        self._pieces = TextPieces(model.tokenizer)
        self._generation = run.result

    def __next__(self) -> str:
        """The next piece."""
        while self._step():
            unread, self._unread = self._unread, []
            if piece := self._pieces.add(unread):
                return piece
        if piece := self._pieces.rest(self.result.text):
            return piece
        raise StopIteration

    def finish(self) -> None:
        """Decode to the end in place of reading pieces; they can be read afterwards."""
        while self._step():
            pass

    def close(self) -> None:
        """Give it up: nothing more is decoded, and the cache is freed.

        What was decoded stays in :attr:`result` and can be read as pieces. Closing an
        ended stream does nothing.
        """
        if self._run is None:
            return
        try:
            self._steps.close()
        finally:
            self._generation, self._run = self._run.result, None
            if self._on_end is not None:
                self._on_end(self._generation)

    def __enter__(self) -> Stream:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def __del__(self) -> None:
        """Close it, if it was made at all."""
        if "_generation" in self.__dict__ and not sys.is_finalizing():
            self.close()

    @property
    def result(self) -> Result:
        """All of it, or what there is so far; ``finish`` says which.

        ``finish`` is ``unfinished`` until the last token is decoded, and stays so if
        the stream was given up.
        """
        generation = self._generation if self._run is None else self._run.result
        return Result(
            text=self._model.decode(generation.token_ids),
            token_ids=generation.token_ids,
            choice=self.choice,
            stats=generation.stats,
            finish=generation.finish,
            seconds_classifying=self.seconds_classifying,
            seed=generation.seed,
            shadows=self.shadows,
        )

    def _step(self) -> bool:
        """Decode one step; False if there is none left."""
        if self._run is None:
            return False
        try:
            tokens = next(self._steps, None)
        except BaseException:
            self.close()
            raise
        if tokens is None:
            self.close()
            return False
        self._unread += tokens
        return True
