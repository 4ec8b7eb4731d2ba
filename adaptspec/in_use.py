"""Sums of what requests took by setting and class, compared with what was tuned."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from threading import RLock, Thread

from adaptspec.decoding.stats import RunStats
from adaptspec.profile import PLAIN, Profile, ProfileStore, Use

Opens = Callable[[], AbstractContextManager[ProfileStore]]


def use_of(profile: int, prompt_class: str, stats: RunStats) -> Use | None:
    """One request's sums; None where nothing was decoded after the prefill.

    Args:
        profile: Id of the profile whose setting decoded it.
    """
    tokens = sum(step.emitted for step in stats.steps)
    seconds = stats.seconds_decode
    if tokens < 1 or seconds <= 0:
        return None
    log = math.log(seconds / tokens)
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
        log,
        log * log,
    )


def plain_of(profile: Profile, profiles: Iterable[Profile]) -> Profile | None:
    """Plain decoding's profile of the run and class of ``profile``."""
    wanted = (profile.run, profile.prompt_class, PLAIN, False)
    for p in profiles:
        if (p.run, p.prompt_class, p.strategy, p.baseline) == wanted:
            return p
    return None


def tuned_ratio(profile: Profile, plain: Profile | None) -> float | None:
    """How many times as fast as plain decoding a setting decoded in tuning.

    Not what ``ratio`` of a measurement holds, which is about the run's objective.
    None where plain decoding's speed isn't known.
    """
    if plain is None:
        return None
    mine = profile.measurement.tokens_per_second
    theirs = plain.measurement.tokens_per_second
    return mine / theirs if mine > 0 and theirs > 0 else None


def expected_ratio(profile: Profile, plain: Profile | None, use: Use) -> float | None:
    """How many times as fast as plain decoding ``profile`` should be in use.

    Plain decoding isn't run in use, so this is the tokens per forward over what a
    forward costs in units of plain decoding's. In tuning that was the tokens per
    forward over the ratio; what is above 1 grows with the candidates per forward, so
    that a setting that stops drafting where it doesn't pay isn't blamed for it.

    Args:
        plain: Plain decoding's profile of the same run and class; None: there is none,
            and nothing is expected.
    """
    ratio = tuned_ratio(profile, plain)
    if ratio is None:
        return None
    tuned = profile.measurement
    cost = tuned.tokens_per_forward / ratio
    if tuned.acceptance > 0 and tuned.tokens_per_forward > 1 and cost > 1:
        proposed = (tuned.tokens_per_forward - 1) / tuned.acceptance  # a forward
        cost = 1 + (cost - 1) * use.proposed / max(1, use.forwards) / proposed
    return use.tokens_per_forward / cost


def fails(
    profile: Profile,
    plain: Profile | None,
    use: Use,
    *,
    requests: int = 20,
    tokens: int = 1000,
    clearly: float = 0.95,
) -> bool:
    """Whether what a setting brought in use is clearly worse than plain decoding.

    Args:
        plain: As for :func:`expected_ratio`.
        requests: Needed for a verdict.
        tokens: Needed for a verdict.
        clearly: The expected ratio to plain decoding that it must stay below.
    """
    if profile.strategy == PLAIN or use.requests < requests or use.tokens < tokens:
        return False
    expected = expected_ratio(profile, plain, use)
    return expected is not None and expected < clearly


def describe(profile: Profile, plain: Profile | None, use: Use) -> str:
    """What was tuned beside what is seen in use, in words."""
    tuned = profile.measurement
    ratio = tuned_ratio(profile, plain)
    expected = expected_ratio(profile, plain, use)
    before = "" if ratio is None else f"tuned {ratio:.2f}x plain decoding; "
    after = "" if expected is None else f"{expected:.2f}x expected from "
    return (
        f"{before}in use {use.requests} requests, {after}"
        f"{use.tokens_per_forward:.2f} tokens per forward "
        f"(tuned {tuned.tokens_per_forward:.2f}), {use.tokens_per_second:.1f} tokens/s "
        f"(tuned {tuned.tokens_per_second:.1f}), acceptance {use.acceptance:.0%} "
        f"(tuned {tuned.acceptance:.0%})"
    )


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

    def add(self, use: Use) -> Use:
        """Add a request; return the sums of its profile and class with it."""
        key = (use.profile, use.prompt_class)
        with self._lock:
            self._forget_parents()
            for sums in (self._total, self._unwritten):
                sums[key] = sums[key] + use if key in sums else use
            total = self._total[key]
            due = self._clock() - self._last >= self._every and self.problem is None
            idle = self._writer is None or not self._writer.is_alive()
            if due and idle:
                self._last = self._clock()
                self._writer = self._started()
        return total

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
