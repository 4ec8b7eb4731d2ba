"""Scores strategies against recorded plain decoding, without the target model.

The engine and the drafters are the real ones. The target's forward is replaced: it
answers with the recorded tokens and lets a clock pass by what the hardware's cost model
says. What a drafter reads of the target beside them, it once read of the recorded text.
The draft model's answers are its own, remembered between trials. Greedy outputs equal
plain decoding's, so the tokens accepted are exactly those of a real run.

A step takes more than a forward timed by itself: the machine may be busier than it was
then, and choosing tokens and book-keeping come on top. Both are seen where the record
was taken, in plain decoding's steps, and hold for every other step, too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from adaptspec.model.forward import Forward
from adaptspec.model.hardware_costs import ForwardCosts
from adaptspec.model.language_model import LanguageModel
from adaptspec_tuner.measuring.profiler import (
    Recording,
)
from adaptspec_tuner.replaying.reading import RecordedOutputs
from adaptspec_tuner.replaying.virtual_clock import VirtualClock

if TYPE_CHECKING:
    from adaptspec.model.forward_times import LatencyCurve
    from adaptspec.token_tree import TokenTree

CONTEXT_STEP = 64  # cached tokens between two curves worth telling apart


class RecordedCache:
    """As much of a :class:`TreeCache` as the engine uses: its length.

    Args:
        moving: Seconds of keeping a path that isn't the first rows.
    """

    def __init__(self, clock: VirtualClock, moving: float) -> None:
        self.length = 0
        self._clock, self._moving = clock, moving

    def keep(self, base: int, nodes: Sequence[int]) -> None:
        """As the tree cache's."""
        self.length = base + len(nodes)
        if any(node != row for row, node in enumerate(nodes)):
            self._clock.replace(perf_counter(), self._moving)

    def truncate(self, length: int) -> None:
        """As the tree cache's."""
        self.length = min(self.length, length)


@dataclass(frozen=True)
class RecordedForward(Forward):
    """A forward whose likeliest tokens are known without logits."""

    known: Sequence[int] = ()
    decided: ClassVar[bool] = True

    @functools.cached_property
    def best(self) -> Sequence[int]:
        """From the record."""
        return self.known


class RecordedTarget(LanguageModel):
    """A target that answers from a recording.

    Logits and hidden states mean nothing, but for those of committed tokens that a
    reading of the recorded text holds.
    """

    def __init__(
        self, model: LanguageModel, costs: ForwardCosts, clock: VirtualClock
    ) -> None:
        _ = model.capability, model.reaches  # settled by the real model
        self.__dict__.update(model.__dict__)
        self._seen = None  # it follows no caller's model
        self.__dict__.pop("latency", None)
        # One reading more of a text isn't what strategies differ in.
        self.__dict__["rereads"] = frozenset()
        self._costs = costs
        self._clock = clock
        self._recording, self._reading = Recording((), (), 0), RecordedOutputs(0)
        self._curves: dict[int, LatencyCurve] = {}
        self._nothing = torch.zeros(1, 1, dtype=model.dtype)
        self.scale = 1.0  # of what the costs say, where the record was taken
        self.extra = 0.0  # seconds of a step beside its forward, those of replay apart

    def play(
        self, recording: Recording, reading: RecordedOutputs | None = None
    ) -> None:
        """Answer from ``recording``, and what was read of it, from here on."""
        self._recording, self._reading = recording, reading or RecordedOutputs(0)

    @functools.cached_property
    def latency(self) -> LatencyCurve:
        """What the cost model says."""
        return self._curve(0)

    def new_cache(self, capacity: int = 0) -> Any:
        """A cache that holds no rows."""
        return RecordedCache(self._clock, self.scale * self._costs.moving)

    def prefill(
        self,
        tokens: Sequence[int],
        cache: Any,
        *,
        last: int = 1,
        hidden_layers: Sequence[int] = (),
    ) -> Forward:
        """The prompt; takes as long as plain decoding's first token did.

        Hidden states are of its last token only.
        """
        started = perf_counter()
        cache.length += len(tokens)
        reading, end = self._reading, len(tokens)
        known = [self._recording.tokens[0]]
        shown, logits = [end - 1], self._empty(1)
        if len(reading.tops):
            shown = list(range(max(reading.first, end - last), end))
            logits = reading.logits_of(shown, self.vocab_size)
            known = [
                *(int(reading.tops[at - reading.first, 0]) for at in shown[:-1]),
                *known,
            ]
        rows = {at: row for row, at in enumerate(shown)}
        forward = RecordedForward(logits, rows, reading.states([end - 1]), known)
        self._clock.replace(started, self._recording.seconds_to_first)
        return forward

    def forward_tree(
        self, tree: TokenTree, cache: Any, *, hidden_layers: Sequence[int] = ()
    ) -> Forward:
        """Every node on the path of the recorded tokens is answered by the next."""
        started = perf_counter()
        record, nodes = self._recording, len(tree)
        cached: int = cache.length
        cache.length = cached + nodes
        # The root is at index `cached` of prompt and tokens.
        at = cached + 1 - len(record.prompt)
        tokens, true = record.tokens, [False] * nodes
        true[0] = True
        best = [0] * nodes
        best[0] = tokens[at] if at < len(tokens) else 0
        for node in range(1, nodes):
            place = at + tree.depths[node]
            parent = tree.parents[node]
            if true[parent] and place <= len(tokens):
                true[node] = tree.tokens[node] == tokens[place - 1]
                if true[node] and place < len(tokens):
                    best[node] = tokens[place]
        # The text's last token was never read: decoding ends with it.
        places = [
            cached + tree.depths[node]
            if true[node] and at + tree.depths[node] < len(tokens)
            else None
            for node in range(nodes)
        ]
        rows, logits = {node: node for node in range(nodes)}, self._empty(nodes)
        if len(self._reading.tops):
            # What the target thinks after tokens it didn't choose isn't on record.
            seen = [node for node in range(nodes) if places[node] is not None]
            ends = [node for node in range(nodes) if true[node] and node not in seen]
            rows = {node: row for row, node in enumerate([*seen, *ends])}
            found = [place for place in places if place is not None]
            logits = self._reading.logits_of(found, self.vocab_size)
            logits = torch.cat([logits, logits.new_zeros(len(ends), self.vocab_size)])
            best = [best[node] for node in rows]
        forward = RecordedForward(logits, rows, self._reading.states(places), best)
        seconds = self.scale * self._curve(cached)(nodes) + self.extra
        self._clock.replace(started, seconds)
        return forward

    def _curve(self, cached: int) -> LatencyCurve:
        place = cached // CONTEXT_STEP
        if place not in self._curves:
            self._curves[place] = self._costs.curve(place * CONTEXT_STEP)
        return self._curves[place]

    def _empty(self, rows: int) -> torch.Tensor:
        return self._nothing.expand(rows, self.vocab_size)
