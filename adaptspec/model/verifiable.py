"""Whether a pass over drafts gives the logits that the model gives without them.

Three kinds of layers prevent it: those that quantise activations with one scale for a
whole pass, those that compute outlier columns of all its rows apart, and those that
round activations to few steps. The last amplify what passes of several sizes differ by
in the last bit. Such a model can only be decoded as its ``generate`` reads texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from adaptspec.model import miniature
from adaptspec.model.quantised import splits_outliers
from adaptspec.model.reference import (
    HALF_TOLERANCE,
    ROUTING_TOLERANCE,
    TOLERANCE,
    logit_distance,
    random_tokens,
    short_length,
    whole_logits,
)
from adaptspec.model.views import replaced_layers

if TYPE_CHECKING:
    from adaptspec.model.forward import ForwardModel

COMPARED_TOKENS = 5
# A column that whole numbers of 8 bits can't span together with small ones.
LARGE_INPUT = 512.0


@torch.inference_mode()
def unverifiable(model: ForwardModel) -> str | None:
    """Why passes over drafts aren't what the model gives without them, or None.

    A model that can't run is left to others to find out.
    """
    if splits_outliers(model.model):
        return (
            "its 8-bit layers choose outlier columns over all tokens of a pass "
            "(llm_int8_threshold); quantised to 4 bits, it can verify drafts"
        )
    if (layer := _rounding_layer(model)) is not None:
        return (
            f"its layers ({layer}) round activations to few steps, so that the last "
            "bits of a pass of another size move its logits; with weights alone "
            "quantised, it can verify drafts"
        )
    if moved := _moved_by_another(model):
        return (
            f"a text's logits move by {moved:.2g} (relative) with another text of the "
            "same pass, as where one scale quantises the activations of both; with "
            "weights alone quantised, it can verify drafts"
        )
    return None


def _moved_by_another(model: ForwardModel) -> float:
    """By how much a text's logits move with what is read beside it; 0 for a rounding.

    Two texts are read as a batch, each beside itself and beside the other: no attention
    joins them, and all passes have one shape, so nothing else moves a bit. Only experts
    do, who are given other numbers of rows.
    """
    count = min(COMPARED_TOKENS, short_length(model))
    drawn = random_tokens(model, 2 * count)
    one, other = drawn[:count], drawn[count:]
    try:
        apart = [
            whole_logits(model, [text, text])[place]
            for place, text in enumerate((one, other))
        ]
        together = whole_logits(model, [one, other])
    except Exception:  # whatever the model's own code raises
        return 0.0
    moved = max(
        logit_distance(*pair)
        for rows in zip(together, apart, strict=True)
        for pair in zip(*rows, strict=True)
    )
    allowed = ROUTING_TOLERANCE
    if miniature.has_experts(model.config):
        allowed = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    return moved if moved > allowed else 0.0


def _rounding_layer(model: ForwardModel) -> str | None:
    """The class of a layer that doesn't tell inputs apart which bfloat16 does."""
    seen: set[tuple[type, type]] = set()
    for layer in replaced_layers(model.model):
        width = getattr(layer, "in_features", None)
        kind = (type(layer), type(getattr(layer, "weight", None)))
        if not isinstance(width, int) or width < 2 or kind in seen:
            continue
        seen.add(kind)
        for pair in _pairs(width, model.dtype, model.device):
            try:
                first, second = (layer(x) for x in pair)
            except Exception:  # not a layer of one input, or it doesn't run here
                break
            if torch.equal(first, second):
                return _named(layer)
    return None


def _pairs(
    width: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs ``[1, 1, width]`` that differ by less than a step of whole numbers of 8
    bits beside a large one, or than a step of 8-bit floating point."""
    signs = torch.ones(width).where(torch.rand(width, generator=_seeded()) < 0.5, -1.0)
    for large, small, other in ((LARGE_INPUT, 0.0, 0.5), (1.0, 0.5, 0.505)):
        pair = [(value * signs).to(device, dtype) for value in (small, other)]
        for x in pair:
            x[0] = large
        yield pair[0].view(1, 1, width), pair[1].view(1, 1, width)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _named(layer: nn.Module) -> str:
    weight = type(getattr(layer, "weight", None))
    plain = weight in (torch.Tensor, nn.Parameter)
    return type(layer).__name__ if plain else weight.__name__
