"""Which shapes a model's forwards can have: graphs, fixed ones, or each its own.

A rung is taken if what it gives is what dynamic shapes give, on the model itself: over
slots that hold rubbish, behind rows that moved, and at another length than the one that
was captured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from adaptspec.model.cache import TreeCache
from adaptspec.model.fixed_cache import FixedCache
from adaptspec.model.fixed_shapes import (
    SPAN,
    WIDTHS,
    FixedShapes,
    Rows,
    Rung,
    Shapes,
)
from adaptspec.model.forward import Capability, ForwardModel
from adaptspec.model.masks import Reach
from adaptspec.model.offloaded import is_offloaded
from adaptspec.model.reference import (
    in_one_line,
    logit_distance,
    random_tokens,
    room,
    short_length,
    tolerance_of,
)
from adaptspec.model.rotary import switching_lengths
from adaptspec.token_tree import TokenTree

# A chain, then a tree whose deeper branch comes second, so that keeping it moves rows.
# Each comes again behind other rows than those it was captured behind.
TRIED_PARENTS = ((-1,), (-1, 0, 1), (-1, 0, 0, 1, 2, 4)) * 2
RUBBISH = 50.0  # in slots that nothing may see


class ShapedModel(ForwardModel, Protocol):
    """A language model as its shapes are settled: a ``LanguageModel``."""

    @property
    def capability(self) -> Capability:
        """What it verifies."""

    @property
    def reaches(self) -> Mapping[str, Reach]:
        """How far layers attend, by their kind."""


@torch.inference_mode()
def settle_shapes(
    model: ShapedModel, run: Rows, asked: Shapes
) -> tuple[FixedShapes | None, Rung]:
    """Try graphs, then fixed shapes without; what neither can do is left dynamic.

    Args:
        run: The model's forward over rows.
        asked: As ``LanguageModel`` says.
    """
    cuda = model.device.type == "cuda"
    if asked == "dynamic" or (asked == "auto" and not cuda):
        return None, Rung("dynamic")
    if reason := _obstacle(model):
        return None, Rung("dynamic", reason)
    fixed = FixedShapes(run, model.device, model.dtype, model.reaches, model.max_length)
    try:
        problem = _compare(model, fixed)
    except Exception as error:
        problem = in_one_line(error)
    if problem:
        return None, Rung("dynamic", f"fixed shapes fail: {problem}")
    if asked == "fixed" or not cuda:
        return fixed, fixed.rung
    if not model.takes_positions:
        fixed.stop_capturing("its forward takes no positions")
        return fixed, fixed.rung
    fixed.graphs = True
    try:
        problem = _compare(model, fixed)
    except Exception as error:
        problem = in_one_line(error)
    if problem:
        fixed.stop_capturing(f"graphs fail: {problem}")
    return fixed, fixed.rung


def _obstacle(model: ShapedModel) -> str | None:
    """Why fixed shapes aren't tried."""
    if model.capability.level == "plain":
        return f"it is decoded plainly: {model.capability.reason}"
    if not model.use_masks or not model.reaches:
        return "its layers make masks of their own"
    if switching_lengths(model.config):
        return "its rotation changes with the length of the text"
    if is_offloaded(model.model):
        return "some of its weights are brought in at each pass"
    places = {p.device for p in model.model.parameters()}
    if len(places) > 1:
        return f"its weights are on {len(places)} devices"
    least = short_length(model) + sum(map(len, TRIED_PARENTS)) + WIDTHS[2]
    if room(model) < least:
        return f"it has {room(model)} positions, and a test takes {least}"
    return None


def _compare(model: ShapedModel, fixed: FixedShapes) -> str | None:
    """How logits differ from those of dynamic shapes, or Nmodel."""
    prompt = random_tokens(model, short_length(model))
    tolerance = tolerance_of(model, prompt)
    layers = int(model.config.num_hidden_layers)
    own, other = TreeCache(layers), None
    model.prefill(prompt, own)
    fixed.learn(own)
    other = fixed.lease(0) or TreeCache(layers)
    model.prefill(prompt, other)
    if isinstance(other, FixedCache):
        _spoil(other)
    tokens = random_tokens(model, len(prompt) + 6)[len(prompt) :]
    for parents in TRIED_PARENTS:
        tree = TokenTree(tokens[: len(parents)], parents)
        cached = own.length
        expected = model.forward_tree(tree, own)
        found = fixed.forward(tree, other)
        if found is None:
            return f"there is no room for {len(tree)} rows"
        if fixed.problem:
            return fixed.problem
        errors = sorted(
            logit_distance(
                found.logits[found.rows[node]], expected.logits[expected.rows[node]]
            )
            for node in range(len(tree))
        )
        # Experts are given other rows by rounding: as in capability, most must agree.
        if not errors[len(errors) // 2] <= tolerance or errors[-1] == float("inf"):
            return f"logits differ by {errors[-1]:.2g} (relative)"
        # Of the deepest nodes the last.
        path = max(tree.ancestors(), key=lambda line: (len(line), line[-1]))
        own.keep(cached, path)
        other.keep(cached, path)
    return None


@torch.inference_mode()
def _spoil(cache: FixedCache) -> None:
    """Leave rubbish in all slots behind the kept ones that no step writes to."""
    for one in cache.set.buffers:
        for buffer in one or ():
            buffer[:, :, cache.length + SPAN // 2 :].fill_(RUBBISH)
