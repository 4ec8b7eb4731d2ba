"""Whether the tokens of one forward pass move each other's logits.

Layers that quantise activations with one scale for a whole pass, or that compute
outlier columns of all its rows apart, give a token other logits beside a draft than
alone. A model with such layers can only be decoded as its ``generate`` reads texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from adaptspec.model.forward import ForwardModel

COMPARED_TOKENS = 5


def mixing(model: ForwardModel) -> str | None:
    """Why what a pass verifies isn't what the model gives alone, or None.

    Two texts are read as a batch, each beside itself and beside the other: no attention
    joins them, and all passes have one shape, so nothing else moves a bit. Only experts
    do, who are given other numbers of rows. A model that can't run is left to others
    to find out.
    """
    if splits_outliers(model.model):
        return (
            "its 8-bit layers choose outlier columns over all tokens of a pass; "
            "quantised with llm_int8_threshold=0.0, it can verify drafts"
        )
    count = min(COMPARED_TOKENS, short_length(model))
    drawn = random_tokens(model, 2 * count)
    one, other = drawn[:count], drawn[count:]
    try:
        apart = [whole_logits(model, [text, text])[0] for text in (one, other)]
        together = whole_logits(model, [one, other])
    except Exception:  # whatever the model's own code raises
        return None
    moved = max(
        logit_distance(*pair)
        for rows in zip(together, apart, strict=True)
        for pair in zip(*rows, strict=True)
    )
    allowed = ROUTING_TOLERANCE
    if miniature.has_experts(model.config):
        allowed = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    if moved <= allowed:
        return None
    return (
        f"a text's logits move by {moved:.2g} (relative) with another text of the same "
        "pass, as where one scale quantises the activations of both; quantised with a "
        "scale per token, it can verify drafts"
    )
