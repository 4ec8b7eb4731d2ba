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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from adaptspec.costs import ForwardCosts
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.decoding.generation_fields import ONE_SEQUENCE
from adaptspec.models import Forward, LanguageModel
from adaptspec.strategy import Needs, union
from adaptspec_tuner.profiler import (
    PLAIN_SETTING,
    Agreement,
    Recording,
    Sample,
    Setting,
    sample_of,
)
from adaptspec_tuner.replay_draft import RememberedDraft
from adaptspec_tuner.replay_reading import Reading, read

if TYPE_CHECKING:
    from adaptspec.decoding.latency import LatencyCurve
    from adaptspec.decoding.tree import TokenTree
    from adaptspec.host import Host
    from adaptspec.strategy import Strategy
    from adaptspec_tuner.workloads import Prompt

CONTEXT_STEP = 64  # cached tokens between two curves worth telling apart
NOTHING = Needs()


class VirtualClock:
    """Real time, but for what stands in for forwards."""

    def __init__(self) -> None:
        self._offset = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return perf_counter() + self._offset

    def replace(self, started: float, seconds: float) -> None:
        """Let the time since ``started`` (real) count as ``seconds``."""
        self._offset += seconds - (perf_counter() - started)


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
        self._recording, self._reading = Recording((), (), 0), Reading(0)
        self._curves: dict[int, LatencyCurve] = {}
        self._nothing = torch.zeros(1, 1, dtype=model.dtype)
        self.scale = 1.0  # of what the costs say, where the record was taken
        self.extra = 0.0  # seconds of a step beside its forward, those of replay apart

    def play(self, recording: Recording, reading: Reading | None = None) -> None:
        """Answer from ``recording``, and what was read of it, from here on."""
        self._recording, self._reading = recording, reading or Reading(0)

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
        """The prompt; takes no time, decoding speed leaves the prefill out.

        Hidden states are of its last token only.
        """
        started = perf_counter()
        cache.length += len(tokens)
        reading, end = self._reading, len(tokens)
        known = [self._recording.tokens[0]]
        shown, logits = [end - 1], self._empty(1)
        if len(reading.tops):
            shown = list(range(max(reading.first, end - last), end))
            logits = reading.laws(shown, self.vocab_size)
            known = [
                *(int(reading.tops[at - reading.first, 0]) for at in shown[:-1]),
                *known,
            ]
        rows = {at: row for row, at in enumerate(shown)}
        forward = RecordedForward(logits, rows, reading.states([end - 1]), known)
        self._clock.replace(started, 0.0)
        return forward

    def verify(
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
            logits = self._reading.laws(found, self.vocab_size)
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


class Replayer:
    """Predicts what :class:`~adaptspec_tuner.profiler.Profiler` would measure.

    Args:
        engine: Its target, for what isn't its forward, and its draft model.
        host: Where strategies are found.
        costs: Of the target's forwards.
        recordings: By prompt id; those that were timed tell what steps take here.
        draft_costs: Of the draft model's; without them it runs anew in every trial.
        tops: Logits that drafters are shown after each committed token. What the target
            thought of tokens that it didn't choose isn't known, so a drafter that
            learns from those, too, does no better than in a real run.
        needs: What strategies to come will need, too: the target reads a text once.
    """

    def __init__(
        self,
        engine: Engine,
        host: Host,
        costs: ForwardCosts,
        recordings: Mapping[str, Recording],
        draft_costs: ForwardCosts | None = None,
        tops: int = 0,
        needs: Needs = NOTHING,
    ) -> None:
        self._host = host
        self._real, self._tops, self._needs = engine.model, tops, needs
        self._readings: dict[str, tuple[Needs, Reading]] = {}
        self._clock = VirtualClock()
        self._target = RecordedTarget(engine.model, costs, self._clock)
        draft, remembered = engine.draft, None
        if draft is not None and draft_costs is not None:
            draft = remembered = RememberedDraft(draft, draft_costs, self._clock)
        self._engine = Engine(self._target, draft, self._clock)
        self._recordings = recordings
        self._strategies: dict[str, Strategy] = {}
        self._controls: dict[int, Controls] = {}
        self._target.scale, self._target.extra = self._seen()
        if remembered is not None:
            remembered.scale = self._target.scale

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        """One generation, predicted."""
        return self._measure(setting, prompt.id)

    def _seen(self) -> tuple[float, float]:
        """How plain decoding's steps compare with what the costs alone predict.

        Returns:
            The factor of a forward, and the seconds of a step beside it that a replayed
            one doesn't take: medians over the prompts that were timed.
        """
        scales, extras = [], []
        for key, recording in self._recordings.items():
            if not (recording.forwards and recording.seconds_target > 0):
                continue
            bare = self._measure(PLAIN_SETTING, key)
            if not bare.forwards:
                continue
            scales.append(
                (recording.seconds_target / recording.forwards)
                / (bare.seconds_target / bare.forwards)
            )
            extras.append(
                recording.seconds_rest / recording.forwards
                - (bare.seconds_draft + bare.seconds_rest) / bare.forwards
            )
        if not scales:
            return 1.0, 0.0
        return median(scales), max(0.0, median(extras))

    def _measure(self, setting: Setting, prompt: str) -> Sample:
        recording = self._recordings[prompt]
        if setting.key not in self._strategies:
            created = self._host.create(setting.strategy, setting.params)
            # Some find out by a forward, which the stand-in couldn't give.
            type(created).unavailable(self._real, self._engine.draft)
            self._strategies[setting.key] = created
        if recording.most not in self._controls:
            self._controls[recording.most] = Controls.for_model(
                self._target,
                max_new_tokens=recording.most,
                temperature=0.0,
                **ONE_SEQUENCE,
            )
        strategy = self._strategies[setting.key]
        self._target.play(recording, self._read(prompt, strategy))
        return sample_of(
            self._engine.generate(
                strategy, recording.prompt, self._controls[recording.most]
            )
        )

    def _read(self, prompt: str, strategy: Strategy) -> Reading | None:
        """What ``strategy`` reads of the target, which runs for it once at most."""
        needs = strategy.needs(self._real)
        if not needs.hidden_layers and not self._tops:
            return None
        needs = union([needs, self._needs])
        kept = self._readings.get(prompt)
        if kept is None or not _serves(kept[0], needs):
            reading = read(
                self._real,
                self._recordings[prompt],
                hidden_layers=needs.hidden_layers,
                prompt_positions=needs.prefill_logits,
                tops=self._tops,
            )
            self._readings[prompt] = kept = needs, reading
        return kept[1]

    def agreement(
        self, prompt: Prompt, plain: Sequence[int], other: Sequence[int]
    ) -> Agreement:
        """A difference is a fault of the replay or the strategy."""
        return "identical" if list(plain) == list(other) else "mismatch"

    def forget(self) -> None:
        """New strategy objects from here on."""
        self._strategies.clear()


def _serves(given: Needs, wanted: Needs) -> bool:
    return (
        set(wanted.hidden_layers) <= set(given.hidden_layers)
        and wanted.prefill_logits <= given.prefill_logits
    )
