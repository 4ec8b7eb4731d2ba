"""Threads take turns at a model, step by step and in the order in which they asked.

A step uses all cores or the whole GPU, so that two at once gain nothing; and while one
runs, nobody else touches the model or what strategies share between sequences.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any, TypeVar

Answer = TypeVar("Answer")

_numbers = count()


class _Turn:
    """A thread's place in the queue."""

    __slots__ = ("has_come", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.has_come: threading.Event | None = None  # made where it must be waited for


class Turns:
    """Who is at work with a model, and who waits.

    The first of the queue is at work. Nothing here holds a lock, since collecting
    garbage may give up a stream between any two instructions, of any thread.
    """

    def __init__(self) -> None:
        self._number = next(_numbers)
        self._queue: deque[_Turn] = deque()
        self._later: deque[Callable[[], object]] = deque()
        self._worker: Executor | None = None
        _all[self._number] = self

    def take(self, step: Callable[[], Answer]) -> Answer:
        """Run ``step`` when the turn has come. Within a step it is run at once."""
        if self.is_mine():
            return step()
        turn = _Turn()
        try:
            self._wait(turn)
            return step()
        finally:
            self._leave(turn)

    def soon(self, step: Callable[[], object]) -> None:
        """Run ``step`` now if nobody is at work, else whoever is runs it afterwards.

        For what garbage collection sets off: it never waits, and is never run in the
        middle of a step. An error in it goes to ``threading.excepthook``.
        """
        self._later.append(step)
        self._catch_up()

    @property
    def worker(self) -> Executor:
        """A thread that runs steps for those who mustn't be kept waiting."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="adaptspec")
        return self._worker

    def is_mine(self) -> bool:
        """Whether this thread is at work."""
        try:
            return self._queue[0].thread == threading.get_ident()
        except IndexError:
            return False

    def _wait(self, turn: _Turn) -> None:
        self._queue.append(turn)
        if self._queue[0] is not turn:
            turn.has_come = threading.Event()
            if self._queue[0] is not turn:  # looked at again: nobody tells twice
                turn.has_come.wait()

    def _leave(self, turn: _Turn) -> None:
        """Let the next one work. ``turn`` may not have come, or not be in the queue."""
        try:
            if self._queue and self._queue[0] is turn:
                self._run_later()
        finally:
            self._remove(turn)
            self._catch_up()

    def _remove(self, turn: _Turn) -> None:
        try:
            self._queue.remove(turn)
        except ValueError:
            return
        try:
            told = self._queue[0].has_come
        except IndexError:
            return
        if told is not None:
            told.set()

    def _catch_up(self) -> None:
        """Run what is left, unless somebody is there who will."""
        while self._later and not self._queue:
            turn = _Turn()
            self._queue.append(turn)
            try:
                if self._queue[0] is turn:
                    self._run_later()
            finally:
                self._remove(turn)

    def _run_later(self) -> None:
        while self._later:
            step = self._later.popleft()
            try:
                step()
            except Exception as error:
                thread = threading.current_thread()
                told = (type(error), error, error.__traceback__, thread)
                threading.excepthook(threading.ExceptHookArgs(told))

    def hold(self) -> None:
        """Wait for the turn, and keep it until :meth:`release`."""
        self._wait(_Turn())

    def release(self) -> None:
        """Give back what :meth:`hold` took."""
        self._leave(self._queue[0])

    def forked(self) -> None:
        """In a forked process: only the thread that forked is there."""
        mine = threading.get_ident()
        self._queue = deque(turn for turn in self._queue if turn.thread == mine)
        self._worker = None

    @property
    def number(self) -> int:
        """In whose order several are taken, so that nobody waits in a circle."""
        return self._number


_all: weakref.WeakValueDictionary[int, Turns] = weakref.WeakValueDictionary()
_of_module: weakref.WeakKeyDictionary[Any, Turns] = weakref.WeakKeyDictionary()


def turns_of(module: Any) -> Turns:
    """The turns at a module, the same for all who decode with it."""
    return _of_module.setdefault(module, Turns())


def take_all(turns: Sequence[Turns], step: Callable[[], Answer]) -> Answer:
    """Run ``step`` when the turns at several models have come."""
    for one in sorted(set(turns), key=lambda one: -one.number):
        step = partial(one.take, step)
    return step()


def _every() -> list[Turns]:
    """All turns there are, in their order."""
    found = (held() for held in _all.valuerefs())
    return sorted(filter(None, found), key=lambda one: one.number)


class _Forks:
    """Lets a process fork between two steps, never within another thread's.

    Attributes:
        is_child: Whether this process was forked from one that had a model.
    """

    def __init__(self) -> None:
        self.is_child = False
        self._held: dict[int, list[Turns]] = {}

    def before(self) -> None:
        """Let steps that run come to their end."""
        held = self._held[threading.get_ident()] = []
        for turns in _every():
            if not turns.is_mine():
                turns.hold()
                held.append(turns)

    def in_parent(self) -> None:
        """Go on."""
        for turns in self._held.pop(threading.get_ident(), []):
            turns.release()

    def in_child(self) -> None:
        """Go on, without the other threads."""
        every = _every()
        self.is_child = self.is_child or bool(every)
        for turns in every:
            turns.forked()
        self.in_parent()
        self._held.clear()


forks = _Forks()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=forks.before,
        after_in_parent=forks.in_parent,
        after_in_child=forks.in_child,
    )
