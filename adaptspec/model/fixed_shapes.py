"""Forwards of few widths, over buffers that stay: what CUDA graphs are captured from.

A forward of few rows takes a GPU less time than Python takes to launch it. A graph is
launched in one call, but computes the same shapes at the same addresses each time. So
trees are filled up to one of a few widths, keys and values have a slot each in buffers
of fixed length, and what is seen of them is said by a mask that the device makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from adaptspec.acceleration.graphs import Captured
from adaptspec.model.cache import TreeCache
from adaptspec.model.fixed_cache import Buffers, FixedCache, SlotSet
from adaptspec.model.forward import Forward
from adaptspec.model.masks import Reach
from adaptspec.model.reference import in_one_line, logit_distance
from adaptspec.model.step_inputs import StepInputs
from adaptspec.token_tree import TokenTree

# What a caller asks for, and what a model's forwards are.
Shapes = Literal["auto", "fixed", "dynamic"]
Kind = Literal["graphs", "fixed", "dynamic"]

WIDTHS = (1, 4, 8, 16, 32, 64)
SPAN = 2 * WIDTHS[-1]  # nodes of a tree that is drafted level by level
# Slots are made in powers of two from the least on. Without a limit on the answer room
# is made for so many tokens at first.
LEAST_SLOTS, USUAL_TOKENS = 1024, 4096
# What graphs of one width may differ by from the forward that they were captured from:
# libraries may choose another product for a captured stream.
GRAPH_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
HALF_ROUNDING = 0.03


@dataclass(frozen=True)
class Rung:
    """How the forwards of decoding are run.

    Args:
        kind: ``graphs``: of fixed shapes, captured; ``fixed``: the same, launched
            operation by operation; ``dynamic``: each of its own shape.
        reason: Why it isn't more; empty where nothing more was asked for.
    """

    kind: Kind
    reason: str = ""


class Rows(Protocol):
    """A model's forward over rows whose mask and positions are given."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Any,
        mask: Any,
        kept: Sequence[int],
        hidden_layers: Sequence[int],
    ) -> Forward:
        """Logits at ``kept`` rows, and hidden states of all."""


class FixedShapes:
    """Runs trees of one model in forwards of few widths.

    Args:
        run: The model's forward.
        reaches: Kind of layer -> how far it attends.
        max_length: Positions there are, None if that isn't known.
        whole: Whether attention goes over all slots. Else keys and values stay in a
            cache that grows, and only widths and what is read are fixed. Default: but
            on a CPU, where each slot takes time.
        most_sets: Sequences that have buffers at the same time; others are decoded in
            dynamic shapes.
        most_free: Sets that are kept while no sequence uses them.
    """

    def __init__(
        self,
        run: Rows,
        device: torch.device,
        dtype: torch.dtype,
        reaches: Mapping[str, Reach],
        max_length: int | None,
        *,
        whole: bool | None = None,
        most_sets: int = 4,
        most_free: int = 2,
    ) -> None:
        self.graphs: bool = False  # whether forwards are captured
        self.problem = ""  # why they aren't
        self.whole = device.type != "cpu" if whole is None else whole
        self._run, self._device, self._dtype = run, device, dtype
        self._reaches, self._max_length = reaches, max_length
        self._most_sets, self._most_free = most_sets, most_free
        self._layers: Sequence[Buffers] | None = None
        self._sets: list[SlotSet] = []
        self._inputs: dict[int, StepInputs] = {}
        self._pool: Any = None

    @property
    def rung(self) -> Rung:
        """What it is now: a width may turn out late that can't be captured."""
        return Rung("graphs" if self.graphs else "fixed", self.problem)

    def learn(self, cache: TreeCache) -> None:
        """See what rows of each layer look like, by those of ``cache``."""
        self._layers = [
            (row.keys[:, :, :1].clone(), row.values[:, :, :1].clone())
            if row.is_initialized and row.keys is not None and row.values is not None
            else None
            for row in cache.rows
        ]

    def lease(self, capacity: int) -> TreeCache | None:
        """An empty cache, with room for ``capacity`` tokens if those aren't many.

        None where other sequences have all sets, or on a CPU.
        """
        if not self.whole or self._layers is None:
            return None
        slots = self._set(min(capacity, USUAL_TOKENS))
        return None if slots is None else FixedCache(slots, self._set)

    @torch.inference_mode()
    def forward(
        self,
        tree: TokenTree,
        cache: TreeCache,
        done: int = 0,
        hidden_layers: Sequence[int] = (),
    ) -> Forward | None:
        """Append the nodes from ``done`` on, as ``LanguageModel.extend`` does.

        Logits come at every new node but unread ones. None, and nothing has happened,
        where there is no such width, or no room for it.
        """
        new, cached = len(tree) - done, cache.length - done
        width = next((width for width in WIDTHS if width >= new), None)
        if width is None or done + width > SPAN:
            return None
        limit = self._max_length
        # Some models count rows, which must be no more than there are positions.
        if limit is not None and cached + done + width > limit:
            return None
        inputs = self._inputs_of(width)
        if not self.whole:
            inputs.fill(tree, cached, done)
            forward = self._over_rows(inputs, cache, cached, done, hidden_layers)
        else:
            if not isinstance(cache, FixedCache) or not self._make_room(cache, cached):
                return None
            inputs.fill(tree, cached, done)
            forward = self._over_slots(inputs, cache, tuple(hidden_layers))
            cache.hold(cached + len(tree))
        cache.truncate(cached + len(tree))
        forward = _nodes(forward, tree, done)
        if isinstance(cache, FixedCache):
            cache.last = forward
        return forward

    @torch.inference_mode()
    def prepare(self, cache: TreeCache, hidden_layers: Sequence[int] = ()) -> None:
        """Capture all widths over the buffers of ``cache``, where any are captured.

        Done once for a set, so that no step waits for it.
        """
        if not self.graphs or not isinstance(cache, FixedCache) or not cache.length:
            return
        if not self._make_room(cache, cache.length):
            return
        root = TokenTree.root_only(0)
        for width in WIDTHS:
            for hidden in {(), tuple(hidden_layers)}:
                if self.graphs and (width, hidden) not in cache.set.graphs:
                    inputs = self._inputs_of(width)
                    inputs.fill(root, cache.length)
                    self._capture(inputs, cache, hidden)
        cache.set.clear(cache.length)  # whatever those rows gave

    def _set(self, rows: int) -> SlotSet | None:
        """A free set with room for ``rows`` and a tree behind them."""
        assert self._layers is not None
        needed = LEAST_SLOTS
        while needed < rows + SPAN:
            needed *= 2
        free = [one for one in self._sets if one.free]
        fitting = [one for one in free if one.capacity >= needed]
        if fitting:
            best = min(fitting, key=lambda one: one.capacity)
            self._sets.remove(best)  # the one that was used last stands last
            self._sets.append(best)
            return best
        for one in free[: max(0, len(free) - self._most_free + 1)]:
            self._sets.remove(one)
        if len(self._sets) >= self._most_sets:
            return None
        made = SlotSet.like(self._layers, needed)
        self._sets.append(made)
        return made

    def _make_room(self, cache: FixedCache, cached: int) -> bool:
        """Whether a tree behind ``cached`` rows has slots, all of them numbers."""
        if cached + SPAN > cache.set.capacity:
            cache.announce(cached + SPAN)
        if not cache.intact or cached + SPAN > cache.set.capacity:
            return False
        # What a row gave that isn't a number stands in its keys and values, too, and
        # what is masked is multiplied by zero.
        if cache.last is not None and not cache.last.finite:
            cache.set.clear(cache.length)
        cache.last = None
        return True

    def _inputs_of(self, width: int) -> StepInputs:
        if width not in self._inputs:
            self._inputs[width] = StepInputs(
                width, SPAN, self._reaches, self._dtype, self._device
            )
        return self._inputs[width]

    def _over_rows(
        self,
        inputs: StepInputs,
        cache: TreeCache,
        cached: int,
        done: int,
        hidden_layers: Sequence[int],
    ) -> Forward:
        """A forward whose attention goes over the rows there are."""
        columns = done + inputs.width
        places = torch.arange(cached + columns, device=self._device)
        return self._run(
            inputs.ids,
            inputs.positions,
            cache,
            inputs.masks(places, columns),
            range(inputs.width),
            hidden_layers,
        )

    def _over_slots(
        self, inputs: StepInputs, cache: FixedCache, hidden: tuple[int, ...]
    ) -> Forward:
        """A forward whose attention goes over all slots, captured if it may be."""
        if self.graphs:
            graph = cache.set.graphs.get((inputs.width, hidden))
            graph = graph or self._capture(inputs, cache, hidden)
            if graph is not None:
                return _copied(graph.replay())
        return self._compute(inputs, cache, hidden)

    def _compute(
        self, inputs: StepInputs, cache: FixedCache, hidden: tuple[int, ...]
    ) -> Forward:
        """What a graph is captured from: nothing here waits for the device."""
        places = torch.arange(cache.set.capacity, device=self._device)
        cache.write_to(inputs.slots)
        try:
            forward = self._run(
                inputs.ids,
                inputs.positions,
                cache,
                inputs.masks(places),
                range(inputs.width),
                hidden,
            )
        finally:
            cache.write_to(None)
        return replace(forward, ranked=forward.rank())

    def _capture(
        self, inputs: StepInputs, cache: FixedCache, hidden: tuple[int, ...]
    ) -> Captured[Forward] | None:
        """The graph of a width, None where it can't be trusted: then none is."""
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            expected = self._compute(inputs, cache, hidden)
            graph = Captured(
                lambda: self._compute(inputs, cache, hidden), self._device, self._pool
            )
            found = graph.replay()
            moved = max(
                logit_distance(one, other)
                for one, other in zip(found.logits, expected.logits, strict=True)
            )
            if not moved <= GRAPH_ROUNDING.get(self._dtype, HALF_ROUNDING):
                raise RuntimeError(f"its logits differ by {moved:.2g} (relative)")
        except Exception as error:  # whatever its layers do that a graph can't hold
            self.stop_capturing(
                f"its forward of {inputs.width} rows can't be captured: "
                f"{in_one_line(error)}"
            )
            return None
        cache.set.graphs[inputs.width, hidden] = graph
        return graph

    def stop_capturing(self, problem: str) -> None:
        """Launch operation by operation from here on."""
        self.graphs, self.problem = False, problem
        for one in self._sets:
            one.graphs.clear()


def _nodes(forward: Forward, tree: TokenTree, done: int) -> Forward:
    """Of a forward's rows those of the new nodes; logits without unread ones."""
    new = len(tree) - done
    kept = [node for node in range(done, len(tree)) if node not in tree.unread]
    logits, ranked = forward.logits[:new], forward.ranked
    ranked = None if ranked is None else ranked[:, :new]
    if len(kept) < new:
        chosen = torch.tensor([node - done for node in kept]).to(logits.device)
        logits = logits[chosen]
        ranked = None if ranked is None else ranked[:, chosen]
    return Forward(
        logits,
        {node: row for row, node in enumerate(kept)},
        {layer: states[:new] for layer, states in forward.hidden.items()},
        ranked=ranked,
    )


def _copied(forward: Forward) -> Forward:
    """What the next replay doesn't write to."""
    assert forward.ranked is not None
    return Forward(
        forward.logits.clone(),
        forward.rows,
        {layer: states.clone() for layer, states in forward.hidden.items()},
        ranked=forward.ranked.clone(),
    )
