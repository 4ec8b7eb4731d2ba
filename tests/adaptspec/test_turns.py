"""Threads come at their turn, and what garbage collection gives up waits for nobody."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from adaptspec.turns import Turns, take_all, turns_of

LONG = 30.0  # seconds after which a test has hung


class Thing:
    """Something that can be decoded with."""


def started(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def joined(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()


def waiting(turns: Turns, count: int) -> None:
    """Return when so many are at work or wait."""
    end = time.monotonic() + LONG
    while len(turns._queue) < count:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_threads_come_in_the_order_in_which_they_asked() -> None:
    turns, order, leave = Turns(), list[int](), threading.Event()
    threads = [started(lambda: turns.take(lambda: leave.wait(LONG)))]
    for number in range(5):
        waiting(turns, number + 1)
        threads.append(started(partial(turns.take, partial(order.append, number))))
    waiting(turns, 6)
    leave.set()
    joined(*threads)
    assert order == [0, 1, 2, 3, 4]


def test_of_two_that_ask_again_and_again_neither_gets_ahead() -> None:
    turns, taken, ended = Turns(), list[str](), threading.Event()

    def step(name: str) -> None:
        while len(turns._queue) < 2 and not ended.is_set():
            time.sleep(1e-4)  # until the other has asked, too
        taken.append(name)

    def work(name: str) -> None:
        for _ in range(50):
            turns.take(lambda: step(name))
        ended.set()

    joined(*[started(partial(work, name)) for name in "ab"])
    assert "".join(taken) in ("ab" * 50, "ba" * 50)


def test_no_two_threads_are_at_work_at_once() -> None:
    turns, inside, most = Turns(), [0], [0]

    def step() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        for _ in range(20):
            pass
        inside[0] -= 1

    threads = [started(lambda: [turns.take(step) for _ in range(300)]) for _ in "abcd"]
    joined(*threads)
    assert (inside, most) == ([0], [1])


def test_within_a_step_one_is_taken_at_once() -> None:
    turns = Turns()
    assert turns.take(lambda: turns.take(lambda: 7)) == 7
    with pytest.raises(ZeroDivisionError):
        turns.take(lambda: turns.take(lambda: 1 // 0))
    assert turns.take(lambda: 8) == 8


def test_what_is_left_for_later_runs_at_once_where_nobody_works() -> None:
    turns, seen = Turns(), list[str]()
    turns.soon(lambda: seen.append("now"))
    assert seen == ["now"]

    def step() -> None:
        turns.soon(lambda: seen.append("after"))
        seen.append("step")

    turns.take(step)
    assert seen == ["now", "step", "after"]


def test_what_is_left_for_later_waits_for_no_other_thread() -> None:
    turns, leave, seen = Turns(), threading.Event(), list[int]()
    worker = started(lambda: turns.take(lambda: leave.wait(LONG)))
    waiting(turns, 1)
    turns.soon(lambda: seen.append(threading.get_ident()))
    assert seen == []
    leave.set()
    joined(worker)
    assert seen == [worker.ident]


def test_nothing_that_is_left_for_later_is_forgotten() -> None:
    turns, done = Turns(), list[int]()

    def work() -> None:
        for number in range(400):
            if number % 3:
                turns.soon(lambda: done.append(1))
            else:
                turns.take(lambda: done.append(1))

    joined(*[started(work) for _ in range(4)])
    assert len(done) == 1600


def test_an_error_in_what_is_left_for_later_harms_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    turns = Turns()
    turns.soon(lambda: 1 // 0)
    assert turns.take(lambda: 5) == 5
    assert [each.exc_type for each in told] == [ZeroDivisionError]


def test_one_that_is_interrupted_while_it_waits_keeps_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns, leave, seen = Turns(), threading.Event(), list[int]()
    first = started(lambda: turns.take(lambda: leave.wait(LONG)))
    waiting(turns, 1)
    wait = threading.Event.wait

    def interrupted(self: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return wait(self, timeout)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Event, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            turns.take(lambda: seen.append(0))
    last = started(lambda: turns.take(lambda: seen.append(1)))
    waiting(turns, 2)
    leave.set()
    joined(first, last)
    assert seen == [1]


def test_several_are_taken_in_one_order_whatever_the_callers() -> None:
    one, other, count = Turns(), Turns(), list[int]()

    def work(turns: list[Turns]) -> None:
        for _ in range(300):
            take_all(turns, lambda: count.append(1))

    joined(
        started(lambda: work([one, other])),
        started(lambda: work([other, one, other])),
    )
    assert len(count) == 600


def test_all_who_decode_with_a_module_share_its_turns() -> None:
    thing, other = Thing(), Thing()
    assert turns_of(thing) is turns_of(thing)
    assert turns_of(thing) is not turns_of(other)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_waits_for_the_step_that_another_thread_is_at() -> None:
    turns, inside, leave = Turns(), list[int](), threading.Event()
    reading, writing = os.pipe()

    def step() -> None:
        inside.append(1)
        leave.wait(LONG)
        inside.clear()

    worker = started(lambda: turns.take(step))
    waiting(turns, 1)
    threading.Timer(0.05, leave.set).start()
    child = os.fork()
    if child == 0:
        # Nobody was at a step, and nobody who isn't here any more is waited for.
        ended = turns.take(lambda: not inside)
        os.write(writing, b"yes" if ended else b"no")
        os._exit(0)
    joined(worker)
    assert os.read(reading, 9) == b"yes"
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    assert turns.take(lambda: 1) == 1
    gc.collect()
