"""Positions at which rotary scalings change a forward, as ``generate`` applies them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptspec.model.cache import TreeCache

if TYPE_CHECKING:
    from adaptspec.model.forward import ForwardModel

# Their ``max_position_embeddings`` is the length after scaling; the others may name
# the length before.
SCALED_LENGTH_GIVEN = ("default", "llama3", "longrope", "proportional")


def context_length(config: Any) -> int | None:
    """Positions a model was made for, rotary scaling included; None if unsaid."""
    length = getattr(config, "max_position_embeddings", None)
    if not length:
        return None
    scaled = int(length)
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        factor = rope.get("factor")
        if kind in SCALED_LENGTH_GIVEN or not isinstance(factor, int | float):
            continue
        before = rope.get("original_max_position_embeddings") or length
        scaled = max(scaled, math.floor(before * factor))
    return scaled


def switching_lengths(config: Any) -> dict[int, bool]:
    """Lengths at which a rotation changes -> whether it goes on changing behind them.

    Up to so many positions one set of frequencies serves; a forward that reaches
    further takes another for all of its tokens.
    """
    found: dict[int, bool] = {}
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        dynamic = "dynamic" in kind
        if not dynamic and kind != "longrope":
            continue
        length = getattr(config, "max_position_embeddings", None)
        if not dynamic:
            length = (
                rope.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or length
            )
        if length:
            found[int(length)] = found.get(int(length), False) or dynamic
    return found


def depth_limit(config: Any, cached: int) -> int:
    """How deep a tree behind ``cached`` rows may reach without changing the rotation.

    Some rotary scalings recompute the frequencies of the whole pass from its largest
    position, so a speculative position past the boundary would change every logit.
    """
    limit = 1 << 30
    for boundary, goes_on in switching_lengths(config).items():
        if cached + 1 <= boundary:
            limit = min(limit, boundary - 1 - cached)
        elif goes_on:
            limit = 0
    return limit


def reread_boundaries(model: ForwardModel) -> frozenset[int]:
    """Numbers of cached tokens at which ``generate`` drops the cache.

    The model's own ``prepare_inputs_for_generation`` is asked at each length where a
    rotation switches.
    """
    prepare = getattr(model.model, "prepare_inputs_for_generation", None)
    if prepare is None:
        return frozenset()
    return frozenset(
        length
        for length in switching_lengths(model.config)
        if _drops_cache(model, prepare, length)
    )


def _drops_cache(model: ForwardModel, prepare: Any, length: int) -> bool:
    cache = TreeCache(1)
    cache.rows[0].length = length
    ids = torch.zeros((1, length + 1), dtype=torch.long, device=model.device)
    arguments: dict[str, Any] = {
        model.cache_argument: cache,
        "attention_mask": torch.ones_like(ids),
        "use_cache": True,
    }
    try:
        given = prepare(ids, next_sequence_length=1, **arguments)
    except Exception:  # made for another version, or for other inputs
        try:
            given = prepare(ids, **arguments)
        except Exception:
            return False
    return given.get(model.cache_argument) is not cache


def growing_rotations(model: nn.Module) -> list[nn.Module]:
    """Modules that remember the longest text they have turned (dynamic scaling)."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "max_seq_len_cached")
        and hasattr(module, "original_max_seq_len")
        and "dynamic" in str(getattr(module, "rope_type", ""))
    ]


def forget(rotary: Any) -> None:
    """Back to the frequencies of a text no longer than the original length.

    The next forward then takes those of its own length, whatever was read before.
    """
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": ""}
    for kind in kinds:
        prefix = f"{kind}_" if kind else ""
        original = getattr(rotary, f"{prefix}original_inv_freq", None)
        current = getattr(rotary, f"{prefix}inv_freq", None)
        name = f"{prefix}max_seq_len_cached"
        if original is None or current is None or not hasattr(rotary, name):
            continue
        if getattr(rotary, name) == rotary.original_max_seq_len:
            continue
        rotary.register_buffer(
            f"{prefix}inv_freq", original.to(current.device), persistent=False
        )
        setattr(rotary, name, rotary.original_max_seq_len)


def _ropes(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or getattr(
        config, "rope_scaling", None
    )
    if not isinstance(parameters, dict) or not parameters:
        return []
    nested = [v for v in parameters.values() if isinstance(v, dict)]
    flat = nested if nested and "rope_type" not in parameters else [parameters]
    return [{**rope, "rope_type": _kind(rope)} for rope in flat]


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
