"""Measures the time of a forward by its number of tokens: how much drafting pays.

Sequoia (arXiv:2402.12374) sizes its trees by such a curve.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from adaptspec.token_tree import TokenTree

if TYPE_CHECKING:
    from adaptspec.model.cache import TreeCache
    from adaptspec.model.forward import ForwardModel

# Numbers of tokens that are timed. With matrix units the time is flat up to 16 and
# jumps at 17.
TIMED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 32, 48, 64)
# Where a model was never tuned and answers wait for it: fewer sizes, but more rounds.
QUICK_ROWS = (1, 2, 4, 8, 16, 17, 24, 32, 64)
# Cached tokens behind which strategies take a model's forwards to be timed.
USUAL_CONTEXT = 128


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds of one verification forward by its number of tokens.

    Args:
        rows: Measured numbers of tokens, ascending.
        seconds: Seconds for each.
        context: Cached tokens they attended to.
    """

    rows: Sequence[int]
    seconds: Sequence[float]
    context: int = USUAL_CONTEXT

    def __call__(self, rows: int) -> float:
        """Seconds for ``rows`` tokens: interpolated, extended by the last slope."""
        if len(self.rows) == 1:
            return self.seconds[0]
        at = bisect.bisect_left(self.rows, rows)
        high = min(max(at, 1), len(self.rows) - 1)
        low = high - 1
        share = (rows - self.rows[low]) / (self.rows[high] - self.rows[low])
        rise = self.seconds[high] - self.seconds[low]
        return max(self.seconds[low] + max(0.0, share) * rise, 1e-9)


class LatencyTimer:
    """Times forwards of one model behind so many cached tokens, round by round.

    A forward here ends with the choice of each row's likeliest token. What a size costs
    beside another is taken within rounds, since a machine is often slow for a whole
    round; a stray pause counts for nothing. More tokens never cost less. Needs a model
    that verifies chains.

    Args:
        context: Cached tokens, fewer where the model has no room for them.
        text: Token ids as the model will see them; each round is of others. A mixture
            of experts reads the weights that its tokens choose. Default: ids from all
            over the vocabulary.
        common_rows: Sizes above are rarely drafted and not timed in every round.
        rounds_of_large: They are timed in one round of so many.
    """

    def __init__(
        self,
        model: ForwardModel,
        rows: Sequence[int] = TIMED_ROWS,
        context: int = USUAL_CONTEXT,
        text: Sequence[int] = (),
        common_rows: int = 16,
        rounds_of_large: int = 4,
    ) -> None:
        if model.max_length is not None:
            rows = [count for count in rows if count < model.max_length] or [1]
            context = max(0, min(context, model.max_length - max(rows)))
        self.context = context
        self._model = model
        self._text = _Text(text, model.vocab_size)
        self._cache = _filled(model, context, max(rows), self._text)
        self._times: dict[int, dict[int, float]] = {count: {} for count in rows}
        self._rounds = 0
        self._common_rows, self._rounds_of_large = common_rows, rounds_of_large
        _timed(model, self._cache, self._text(0, 1), context)  # warm-up

    def round(self) -> None:
        """Time each size once, every other round from the largest down."""
        sizes = list(self._times)
        start = self._rounds * self._common_rows
        large = self._rounds % self._rounds_of_large == 0
        for count in sizes if self._rounds % 2 == 0 else reversed(sizes):
            if large or count <= self._common_rows:
                self._times[count][self._rounds] = _timed(
                    self._model, self._cache, self._text(start, count), self.context
                )
        self._rounds += 1

    def curve(self) -> LatencyCurve:
        """What the rounds so far say; one is needed."""
        seconds = rising(typical(list(self._times.values())))
        return LatencyCurve(tuple(self._times), tuple(seconds), self.context)


def measure_latency(
    model: ForwardModel,
    rows: Sequence[int] = QUICK_ROWS,
    rounds: int = 12,
    *,
    context: int = USUAL_CONTEXT,
    longest: float = 5.0,
) -> LatencyCurve:
    """Time forwards of each size by a :class:`LatencyTimer`.

    Args:
        rounds: At most.
        context: Cached tokens, fewer where the model has no room for them.
        longest: Seconds after which no further round begins.
    """
    timer = LatencyTimer(model, rows, context)
    time_rounds([timer], rounds, longest)
    return timer.curve()


def time_rounds(timers: Sequence[LatencyTimer], rounds: int, longest: float) -> None:
    """One round of each after the other, so that drift falls on all timers alike.

    Args:
        rounds: At most, of each.
        longest: Seconds after which no further round of all begins.
    """
    started = perf_counter()
    for _ in range(rounds):
        for timer in timers:
            timer.round()
        if perf_counter() - started > longest:
            break


def measure_moving(
    model: ForwardModel,
    context: int = USUAL_CONTEXT,
    path: Sequence[int] = (0, 2, 3),
    repeats: int = 5,
) -> float:
    """Seconds of keeping a path whose rows must be moved, over keeping a prefix.

    That is what a tree costs a step beside its forward, when its first branch isn't the
    one that is accepted.

    Args:
        path: Of the tree's nodes, one that isn't its first rows.
        repeats: How often either is timed.
    """
    size = path[-1] + 1
    if model.max_length is not None:
        context = max(0, min(context, model.max_length - size))
    text = _Text((), model.vocab_size)
    cache = _filled(model, context, size, text)
    tokens = text(0, size)
    tree = TokenTree.chain(tokens[0], tokens[1:])
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * repeats):
        model.forward_tree(tree, cache)
        moved = turn % 2 == 1
        nodes = path if moved else range(len(path))
        _wait(model)
        started = perf_counter()
        cache.keep(context, nodes)
        _wait(model)
        times[moved].append(perf_counter() - started)
        cache.truncate(context)
    return max(0.0, median(times[True]) - median(times[False]))


def typical(times: Sequence[Mapping[int, float]], sweeps: int = 4) -> list[float]:
    """Typical seconds of each size, with the machine's speed in each round divided out.

    Sizes are compared within rounds, by Tukey's median polish (Exploratory Data
    Analysis, 1977) of the logarithms.

    Args:
        times: Of each size: round -> seconds.
        sweeps: Of the polish, by sizes and by rounds.
    """
    logs = [{at: log(max(seconds, 1e-9)) for at, seconds in of.items()} for of in times]
    rounds = sorted(set().union(*logs))
    sizes, moods = [0.0] * len(logs), dict.fromkeys(rounds, 0.0)
    for _ in range(sweeps):
        sizes = [median(of[at] - moods[at] for at in of) for of in logs]
        for at in rounds:
            moods[at] = median(
                of[at] - size for of, size in zip(logs, sizes, strict=True) if at in of
            )
    middle = median(moods.values())
    return [exp(size + middle) for size in sizes]


def rising(seconds: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls: neighbours that do are averaged.

    Pool adjacent violators (Ayer and others 1955, An empirical distribution function
    for sampling with incomplete information).
    """
    pools: list[tuple[float, int]] = []
    for value in seconds:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            other, size = pools.pop()
            mean = (mean * count + other * size) / (count + size)
            count += size
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


class _Text:
    """Tokens to time forwards on.

    Args:
        ids: A text's; without any, ids from all over the vocabulary.
        count: How many such ids there are.
        stride: How far apart two that follow each other are.
    """

    def __init__(
        self,
        ids: Sequence[int],
        vocab_size: int,
        count: int = 509,
        stride: int = 7919,
    ) -> None:
        self._ids = list(ids) or [at * stride % vocab_size for at in range(count)]

    def __call__(self, start: int, count: int) -> list[int]:
        """``count`` tokens in their order, from the start again behind the end."""
        return [self._ids[(start + at) % len(self._ids)] for at in range(count)]


def _filled(
    model: ForwardModel, context: int, room: int, text: _Text, really_read: int = 16
) -> TreeCache:
    """A cache of ``context`` tokens with ``room`` for more.

    Args:
        really_read: So many tokens; the other rows are copies.
    """
    cache = model.new_cache(context + room)
    if context:
        # What the rows hold doesn't matter, and reading so many would take long.
        model.prefill(text(0, min(context, really_read)), cache)
        cache.repeat(context)
    return cache


def _timed(
    model: ForwardModel, cache: TreeCache, tokens: Sequence[int], context: int
) -> float:
    """Seconds of one forward of ``tokens``."""
    tree = TokenTree.chain(tokens[0], tokens[1:])
    started = perf_counter()
    _ = model.forward_tree(tree, cache).best  # waits for the device, too
    seconds = perf_counter() - started
    cache.truncate(context)
    return seconds


def _wait(model: ForwardModel) -> None:
    """Wait until the device has finished."""
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize(model.device)
