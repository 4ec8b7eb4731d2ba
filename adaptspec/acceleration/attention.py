"""Attention for verification: grouped query heads without repeating keys and values.

transformers' SDPA path copies keys and values once per query head of a group as soon as
there is a mask. Here the query heads of a group become rows of one longer query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "adaptspec_sdpa"

# Beyond this the query itself is the larger part of the work.
MOST_ROWS = 64


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from ``query [1, heads, rows, d]`` to ``key [1, groups, length, d]``.

    Falls back to transformers' own SDPA where there is nothing to group.
    """
    rows, groups = query.shape[2], key.shape[1]
    each = query.shape[1] // groups
    if (
        query.shape[0] != 1
        or each == 1
        or not 1 < rows <= MOST_ROWS
        or attention_mask is None
        or attention_mask.dim() != 4
        or attention_mask.shape[1] != 1
        or dropout
        or kwargs.get("position_bias") is not None
        or kwargs.get("softcap") is not None
    ):
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            is_causal,
            **kwargs,
        )
        return output
    head = query.shape[3]
    grouped = query.reshape(1, groups, each * rows, head)
    attended = scaled_dot_product_attention(
        grouped, key, value, attn_mask=_repeated(attention_mask, each), scale=scaling
    )
    attended = attended.reshape(1, groups * each, rows, value.shape[3])
    return attended.transpose(1, 2).contiguous(), None


def _repeated(mask: torch.Tensor, each: int) -> torch.Tensor:
    """The mask's rows once per head of a group; kept on the mask for the next layer."""
    repeated: torch.Tensor | None = getattr(mask, "adaptspec_repeated", None)
    if repeated is None or repeated.shape[2] != each * mask.shape[2]:
        repeated = mask.repeat(1, 1, each, 1)
        mask.adaptspec_repeated = repeated  # type: ignore[attr-defined]
    return repeated


def use_grouped_attention(view: Any) -> bool:
    """Switch a module tree of ours from SDPA to grouped attention; True if it was."""
    config = getattr(view, "config", None)
    if config is None or getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    text = config.get_text_config(decoder=True)
    try:
        groups = getattr(text, "num_key_value_heads", None)
        heads = getattr(text, "num_attention_heads", None)
    except RuntimeError:  # they differ from layer to layer
        return False
    if not groups or not heads or groups >= heads:
        return False
    # Each key/value head is one unit of work on the CPU: fewer than threads are slow.
    if (
        next(view.parameters()).device.type == "cpu"
        and groups < torch.get_num_threads()
    ):
        return False
    # Towers for pictures and sound keep theirs: some have no choice.
    parts = [key for key in config.sub_configs if getattr(config, key, None) is text]
    view.set_attn_implementation(dict.fromkeys(["", *parts], NAME))
    return True


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
