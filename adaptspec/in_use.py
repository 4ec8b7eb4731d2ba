"""Sums of what requests took by setting and class, compared with what was tuned."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from threading import RLock, Thread

from adaptspec.decoding.stats import RunStats
from adaptspec.profile import LATENCY, SPEED, Profile, ProfileStore, Use

Opens = Callable[[], AbstractContextManager[ProfileStore]]


def use_of(profile: int, prompt_class: str, stats: RunStats) -> Use | None:
    """One request's sums, without its ratio to plain decoding.

    None where nothing was decoded after the prefill.

    Args:
        profile: Id of the profile whose setting decoded it.
    """
    tokens = sum(step.emitted for step in stats.steps)
    seconds = stats.seconds_decode
    if tokens < 1 or seconds <= 0:
        return None
    return Use(
        profile,
        prompt_class,
        1,
        tokens,
        stats.target_forwards,
        stats.proposed,
        stats.accepted,
        stats.seconds_prefill,
        seconds,
    )


def ratio_of(stats: RunStats, objective: str) -> float | None:
    """How many times as fast as plain decoding a request was, by the guard's times.

    None where the guard has timed no plain step yet, or there is no guard; and where a
    grammar forced tokens, unless whole answers are compared.

    Args:
        objective: What is compared, as of :class:`~adaptspec.profile.Measurement`.
    """
    step, gained = stats.plain_step, stats.seconds_gained
    if step is None or gained is None:
        return None
    if objective in (LATENCY, SPEED) and stats.forced:
        return None
    if objective == LATENCY:
        took, plain = stats.latency_p95, 1e3 * step
    elif objective == SPEED:
        took = stats.seconds_decode
        plain = step * sum(one.emitted for one in stats.steps)
    else:
        took = stats.seconds_prefill + stats.seconds_decode
        plain = took + gained
    return plain / took if min(took, plain) > 0 else None


def describe(profile: Profile, use: Use) -> str:
    """What was tuned beside what is seen in use, in words."""
    tuned = profile.measurement
    ratio = ""
    if use.ratio is not None:
        ratio = f", {use.ratio:.2f}x plain decoding lately (tuned {tuned.ratio:.2f}x)"
    return (
        f"{use.requests} requests{ratio}, "
        f"{use.tokens_per_forward:.2f} tokens per forward "
        f"(tuned {tuned.tokens_per_forward:.2f}), {use.tokens_per_second:.1f} tokens/s "
        f"(tuned {tuned.tokens_per_second:.1f}), acceptance {use.acceptance:.0%} "
        f"(tuned {tuned.acceptance:.0%})"
    )


def _nothing(profile: int, prompt_class: str) -> Use:
    return Use(profile, prompt_class, 0, 0, 0, 0, 0, 0.0, 0.0)


class Uses:
    """Adds up what requests took; writes it now and then, where nobody waits for it.

    A store that can't be written ends the recording, not the request.

    Args:
        opens: Gives the store to write to.
        known: What the store held when it was read.
        every: Seconds between two writings.
        clock: Seconds.
    """

    def __init__(
        self,
        opens: Opens,
        known: Iterable[Use] = (),
        *,
        every: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._opens, self._every, self._clock = opens, every, clock
        self._total = {(use.profile, use.prompt_class): use for use in known}
        self._unwritten: dict[tuple[int, str], Use] = {}
        self._last = clock()
        # A stream that is dropped while another request is added adds its own.
        self._lock, self._process = RLock(), os.getpid()
        self._writer: Thread | None = None
        self.problem: str | None = None  # why nothing is written any more
        _all.add(self)

    def fade(self, profiles: Iterable[int], prompt_class: str, kept: float) -> None:
        """Keep a share of what is known of these profiles' ratios in a class."""
        with self._lock:
            self._forget_parents()
            for profile in profiles:
                key = (profile, prompt_class)
                if key in self._total:
                    self._total[key] = self._total[key].faded(kept)
                    unwritten = self._unwritten.get(key) or _nothing(*key)
                    self._unwritten[key] = unwritten.faded(kept)

    def add(self, use: Use) -> None:
        """Add a request."""
        with self._lock:
            self._forget_parents()
            self._add(use)
            due = self._clock() - self._last >= self._every and self.problem is None
            idle = self._writer is None or not self._writer.is_alive()
            if due and idle:
                self._last = self._clock()
                self._writer = self._started()

    def _add(self, use: Use) -> None:
        key = (use.profile, use.prompt_class)
        for sums in (self._total, self._unwritten):
            sums[key] = sums[key] + use if key in sums else use

    def total(self, profile: int, prompt_class: str) -> Use | None:
        """The sums of a profile and class; None where there are none."""
        with self._lock:
            return self._total.get((profile, prompt_class))

    def totals(self) -> list[Use]:
        """All sums, those of earlier programs included."""
        with self._lock:
            return list(self._total.values())

    def write(self) -> None:
        """Write what isn't written yet in one transaction."""
        with self._lock:
            self._forget_parents()
            if self.problem is not None or not self._unwritten:
                return
            uses, self._unwritten = self._unwritten, {}
        try:
            with self._opens() as store:
                store.add_uses(list(uses.values()))
        # A third party's store may raise anything; no request depends on it.
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"

    def close(self) -> None:
        """Write the rest, after a writing that has begun has ended."""
        if self._writer is not None and os.getpid() == self._process:
            self._writer.join(timeout=5.0)
        self.write()

    def _started(self) -> Thread | None:
        """A thread that writes; None where there can't be another one now."""
        writer = Thread(target=self.write, daemon=True)
        try:
            writer.start()
        except RuntimeError:
            return None
        return writer

    def renew_lock(self) -> None:
        """In a forked process: the thread that held the lock may not be there."""
        self._lock = RLock()

    def _forget_parents(self) -> None:
        """In a forked process, leave what the parent added to the parent."""
        if os.getpid() != self._process:
            self._process, self._unwritten, self._writer = os.getpid(), {}, None


_all: weakref.WeakSet[Uses] = weakref.WeakSet()


def _renew_locks() -> None:
    for uses in _all:
        uses.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
