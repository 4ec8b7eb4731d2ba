"""Several generations of one prompt, decoded step by step in turns.

So a machine whose speed changes while they run changes it for all of them at the same
place of the answer, and ratios between them stay right.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from adaptspec.errors import stopped_by_user
from adaptspec_tuner.measuring.whole import Whole

if TYPE_CHECKING:
    from adaptspec.decoding.engine import Generation


class Generating(Protocol):
    """A generation that is iterated over: the tokens of the prefill, then of each step.

    :class:`adaptspec.decoding.engine.Run` is one.
    """

    def __iter__(self) -> Generator[list[int], None, None]:
        """The tokens of each step; the generation is closed with the iterator."""

    @property
    def result(self) -> Generation:
        """What was generated so far, and its statistics."""


class SharedAnswer:
    """One greedy answer that several generations of a prompt write together.

    In low precision a near tie between two tokens may fall differently in a tree of
    another size, and what follows is another answer, easier or harder to draft. Here
    the generation that comes to a place first chooses its token, the others take it,
    and what each would have chosen is remembered.

    Attributes:
        tokens: The answer so far; there may be some behind its end.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._own: dict[str, dict[int, int]] = {}

    def follow(self, name: str) -> Callable[[int, int], int]:
        """The argument ``follow`` of the run of this name."""
        own = self._own.setdefault(name, {})

        def follow(place: int, token: int) -> int:
            if place == len(self.tokens):
                self.tokens.append(token)
            taken = self.tokens[place]
            if token != taken:
                own[place] = token
            return taken

        return follow

    def differences(self, one: str, other: str) -> list[tuple[int, int, int]]:
        """Where two chose differently after the same text: place, both tokens."""
        left, right = self._own.get(one, {}), self._own.get(other, {})
        found = []
        for place in sorted({*left, *right}):
            taken = self.tokens[place]
            pair = left.get(place, taken), right.get(place, taken)
            if pair[0] != pair[1]:
                found.append((place, *pair))
        return found


class Piece(NamedTuple):
    """The prefill or a step of one generation, as it was timed from outside.

    Args:
        when: Its number among the pieces of all generations, in time.
        seconds: By the clock.
        processor: Seconds of processor time that the process took, all threads
            together; less than ``seconds`` where it stood still.
    """

    when: int
    seconds: float
    processor: float


class Timed:
    """A generation whose pieces are timed; it ends where it raises.

    Args:
        begin: Begins it, with its first piece.
        numbers: Of the pieces, shared by the generations that take turns.
        clock: Seconds.
        processor: Seconds of processor time of this process.

    Attributes:
        pieces: The prefill's, then each step's.
        error: What it raised, None if nothing.
    """

    def __init__(
        self,
        begin: Callable[[], Generating],
        numbers: Iterator[int],
        clock: Callable[[], float] = time.perf_counter,
        processor: Callable[[], float] = time.process_time,
    ) -> None:
        self._begin, self._numbers = begin, numbers
        self._clock, self._processor = clock, processor
        self._generating: Generating | None = None
        self._steps: Generator[list[int], None, None] | None = None
        self.pieces: list[Piece] = []
        self.error: Exception | None = None

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> list[int]:
        started, before = self._clock(), self._processor()
        try:
            if self._steps is None:
                self._generating = self._begin()
                self._steps = iter(self._generating)
            tokens = next(self._steps)
        except StopIteration:
            raise
        # A third party's strategy may raise anything, and so may a model.
        except Exception as error:
            if stopped_by_user(error):
                raise
            self.error = error
            raise StopIteration from None
        taken = self._processor() - before
        piece = Piece(next(self._numbers), self._clock() - started, taken)
        self.pieces.append(piece)
        return tokens

    @property
    def result(self) -> Generation:
        """What was generated; it must have begun."""
        assert self._generating is not None
        return self._generating.result

    @property
    def whole(self) -> bool:
        """Whether it came in one piece, so that its steps weren't timed."""
        return isinstance(self._generating, Whole)

    def close(self) -> None:
        """End it; what it holds is released."""
        if self._steps is not None:
            self._steps.close()


def take_turns(
    going: Mapping[str, Iterator[Sequence[int]]],
) -> Iterator[tuple[str, Sequence[int] | None]]:
    """Advance all of them a step at a time; each step's name and tokens, None at its
    end.

    The one with the fewest tokens is next; of several that which waited longest, at
    first in the mapping's order. So all prompts are read first, one after the other,
    and then all are at about the same place of the answer.
    """
    emitted = dict.fromkeys(going, 0)  # those still going
    while emitted:
        name = min(emitted, key=emitted.__getitem__)
        before = emitted.pop(name)
        tokens = next(going[name], None)
        if tokens is not None:
            emitted[name] = before + len(tokens)
        yield name, tokens


def decode_in_turns(
    begin: Mapping[str, Callable[[], Generating]],
    *,
    together: bool = True,
    needed: str | None = None,
    numbers: Iterator[int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    processor: Callable[[], float] = time.process_time,
) -> dict[str, Timed]:
    """Decode all of them, timed; one that raises ends, and the others go on.

    Args:
        begin: Name -> what begins its generation; the first turns are in this order.
        together: Whether they take turns, or are decoded whole in this order.
        needed: The name of one without which the others end, too.
        numbers: Of the pieces, where those of several calls are told apart.
        clock: Seconds.
        processor: Seconds of processor time of this process.
    """
    numbers = itertools.count() if numbers is None else numbers
    timed = {name: Timed(one, numbers, clock, processor) for name, one in begin.items()}
    groups = [timed] if together else [{name: one} for name, one in timed.items()]
    try:
        for name, tokens in itertools.chain.from_iterable(map(take_turns, groups)):
            if tokens is None:
                timed[name].close()
                if name == needed and timed[name].error is not None:
                    break
    finally:
        for one in timed.values():
            one.close()
    return timed
