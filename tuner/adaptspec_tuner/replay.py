"""Scores strategies against recorded plain decoding, without the target model.

The engine and the drafters are the real ones. The target's forward is replaced: it
answers with the recorded tokens and lets a clock pass by what the hardware's cost model
says. The draft model's answers are its own, remembered between trials. Greedy outputs
equal plain decoding's, so the tokens accepted are exactly those of a real run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from adaptspec.costs import ForwardCosts
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.models import Forward, LanguageModel
from adaptspec_tuner.profiler import Agreement, Recording, Sample, Setting, sample_of
from adaptspec_tuner.replay_draft import RememberedDraft

if TYPE_CHECKING:
    from adaptspec.decoding.latency import LatencyCurve
    from adaptspec.decoding.tree import TokenTree
    from adaptspec.host import Host
    from adaptspec.strategy import Strategy
    from adaptspec_tuner.workloads import Prompt

CONTEXT_STEP = 64  # cached tokens between two curves worth telling apart


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
    """As much of a :class:`TreeCache` as the engine uses: its length."""

    def __init__(self) -> None:
        self.length = 0

    def keep(self, base: int, nodes: Sequence[int]) -> None:
        """As the tree cache's."""
        self.length = base + len(nodes)

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
    """A target that answers from a recording; its logits mean nothing."""

    def __init__(
        self, model: LanguageModel, costs: ForwardCosts, clock: VirtualClock
    ) -> None:
        _ = model.capability, model.reaches  # settled by the real model
        self.__dict__.update(model.__dict__)
        self.__dict__.pop("latency", None)
        self._costs = costs
        self._clock = clock
        self._recording = Recording((), (), 0)
        self._curves: dict[int, LatencyCurve] = {}
        self._nothing = torch.zeros(1, 1, dtype=model.dtype)

    def play(self, recording: Recording) -> None:
        """Answer from ``recording`` from here on."""
        self._recording = recording

    @functools.cached_property
    def latency(self) -> LatencyCurve:
        """What the cost model says."""
        return self._curve(0)

    def new_cache(self, capacity: int = 0) -> Any:
        """A cache that holds no rows."""
        return RecordedCache()

    def prefill(
        self,
        tokens: Sequence[int],
        cache: Any,
        *,
        last: int = 1,
        hidden_layers: Sequence[int] = (),
    ) -> Forward:
        """The prompt; takes no time, decoding speed leaves the prefill out."""
        started = perf_counter()
        cache.length += len(tokens)
        first = self._recording.tokens[0]
        forward = RecordedForward(self._empty(1), {len(tokens) - 1: 0}, {}, [first])
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
        forward = RecordedForward(
            self._empty(nodes), {node: node for node in range(nodes)}, {}, best
        )
        self._clock.replace(started, self._curve(cached)(nodes))
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
        recordings: By prompt id.
        draft_costs: Of the draft model's; without them it runs anew in every trial.
    """

    def __init__(
        self,
        engine: Engine,
        host: Host,
        costs: ForwardCosts,
        recordings: Mapping[str, Recording],
        draft_costs: ForwardCosts | None = None,
    ) -> None:
        self._host = host
        self._clock = VirtualClock()
        self._target = RecordedTarget(engine.model, costs, self._clock)
        draft = engine.draft
        if draft is not None and draft_costs is not None:
            draft = RememberedDraft(draft, draft_costs, self._clock)
        self._engine = Engine(self._target, draft, self._clock)
        self._recordings = recordings
        self._strategies: dict[str, Strategy] = {}
        self._controls: dict[int, Controls] = {}

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        """One generation, predicted."""
        recording = self._recordings[prompt.id]
        if setting.key not in self._strategies:
            created = self._host.create(setting.strategy, setting.params)
            self._strategies[setting.key] = created
        if recording.most not in self._controls:
            self._controls[recording.most] = Controls.for_model(
                self._target, max_new_tokens=recording.most, temperature=0.0
            )
        self._target.play(recording)
        return sample_of(
            self._engine.generate(
                self._strategies[setting.key],
                recording.prompt,
                self._controls[recording.most],
            )
        )

    def agreement(
        self, prompt: Prompt, plain: Sequence[int], other: Sequence[int]
    ) -> Agreement:
        """A difference is a fault of the replay or the strategy."""
        return "identical" if list(plain) == list(other) else "mismatch"

    def forget(self) -> None:
        """New strategy objects from here on."""
        self._strategies.clear()
