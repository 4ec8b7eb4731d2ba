"""Attention for verification: few rows, heads that share keys and values.

transformers' SDPA path copies keys and values once per query head of a group as soon as
there is a mask, and how torch's product rounds depends on the number of rows. On the
CPU our kernel reads keys and values where they lie in the cache, and sums each row
alike. Without it the query heads of a group become rows of one longer query.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from adaptspec.acceleration.native import (
    Kernel,
    NativeUnavailableError,
    Seen,
    kernel,
)

NATIVE, GROUPED = "adaptspec_native", "adaptspec_grouped"

# Beyond this the query itself is the larger part of the work.
MOST_ROWS = 64


def native_attention(
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
    """Attend from ``query [1, heads, rows, d]`` to ``key [1, groups, length, d]`` with
    our kernel; as :func:`grouped_attention` where it doesn't take them."""
    rows = query.shape[2]
    compiled = kernel()
    if (noted := getattr(_WATCHING, "noted", None)) is not None:
        used = query.shape[3] ** -0.5 if scaling is None else scaling
        plain = not dropout and not _weighs(kwargs)
        noted.append(Attended(query, key, used, attention_mask, plain))
    if (
        _shapes_fit(query, key, value)
        and rows <= MOST_ROWS
        and (attention_mask is not None or rows == 1)
        and not dropout
        and not _weighs(kwargs)
        and compiled.attends(query, key, value)
        and (sight := sight_of(compiled, attention_mask, rows, key.shape[2]))
        is not None
    ):
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        attended = compiled.attend(query[0], key[0], value[0], sight.seen, scale)
        return attended[None], None
    return grouped_attention(
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
        or not _fewest(query) <= rows <= MOST_ROWS
        or attention_mask is None
        or attention_mask.dim() != 4
        or attention_mask.shape[1:3] != (1, rows)
        or dropout
        or _weighs(kwargs)
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


@dataclass(frozen=True)
class Sight:
    """What a mask lets rows see; None: everything."""

    seen: Seen | None


@dataclass(frozen=True)
class Attended:
    """What a module asked our attention for."""

    query: torch.Tensor  # [1, heads, rows, d]
    key: torch.Tensor  # [1, groups, length, d]
    scale: float
    mask: torch.Tensor | None
    plain: bool  # nothing but products and the mask decides


_WATCHING = threading.local()


@contextlib.contextmanager
def watched() -> Iterator[list[Attended]]:
    """Inside, what modules of this thread ask :func:`native_attention` for is noted."""
    noted: list[Attended] = []
    _WATCHING.noted = noted
    try:
        yield noted
    finally:
        _WATCHING.noted = None


def _shapes_fit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether one sequence's rows attend to as many keys as values, by whole groups."""
    return (
        query.shape[0] == key.shape[0] == value.shape[0] == 1
        and key.shape[1:3] == value.shape[1:3]
        and query.shape[3] == key.shape[3]
        and query.shape[1] % key.shape[1] == 0
        and min(query.shape[2], key.shape[2]) > 0
    )


def _weighs(arguments: dict[str, Any]) -> bool:
    """Whether more than products and a mask decides what is attended to."""
    return any(
        arguments.get(name) is not None
        for name in ("position_bias", "softcap", "s_aux", "sinks", "head_mask")
    )


def sight_of(
    compiled: Kernel, mask: torch.Tensor | None, rows: int, length: int
) -> Sight | None:
    """Kept on the mask for the next layer; None where the kernel can't follow it."""
    if mask is None:
        return Sight(None)
    if mask.dim() != 4 or mask.shape != (1, 1, rows, length):
        return None
    known: tuple[Sight | None] | None = getattr(mask, "adaptspec_sight", None)
    if known is None:
        seen = compiled.seen(mask[0, 0])
        known = (None if seen is None else Sight(seen),)
        mask.adaptspec_sight = known  # type: ignore[attr-defined]
    return known[0]


def _fewest(query: torch.Tensor) -> int:
    """Rows from which on grouping pays: elsewhere than on the CPU even one would have
    its keys and values copied for each head, as soon as there is a mask."""
    return 2 if query.device.type == "cpu" else 1


def _repeated(mask: torch.Tensor, each: int) -> torch.Tensor:
    """The mask's rows once per head of a group; kept on the mask for the next layer."""
    repeated: torch.Tensor | None = getattr(mask, "adaptspec_repeated", None)
    if repeated is None or repeated.shape[2] != each * mask.shape[2]:
        repeated = mask.repeat(1, 1, each, 1)
        mask.adaptspec_repeated = repeated  # type: ignore[attr-defined]
    return repeated


def use_our_attention(view: Any) -> str | None:
    """Switch a module tree of ours from SDPA to our attention.

    Returns:
        Its name; None where SDPA stays, as in modules whose code asks for it by name.
    """
    config = getattr(view, "config", None)
    if config is None or getattr(config, "_attn_implementation", None) != "sdpa":
        return None
    if any(_names_sdpa(name) for name in {type(m).__module__ for m in view.modules()}):
        return None
    text = config.get_text_config(decoder=True)
    if next(view.parameters()).device.type == "cpu" and _native():
        name = NATIVE
    elif _groups(text, next(view.parameters()).device):
        name = GROUPED
    else:
        return None
    # Towers for pictures and sound keep theirs: some have no choice.
    parts = [key for key in config.sub_configs if getattr(config, key, None) is text]
    view.set_attn_implementation(dict.fromkeys(["", *parts], name))
    return name


@functools.cache
def _names_sdpa(module: str) -> bool:
    """Whether code compares its attention's name with "sdpa" (sparse attention does):
    under another name it would compute something else. So might code that can't be
    read."""
    if module.partition(".")[0] == "torch":
        return False
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return True
    return re.search(r"""["']sdpa["']""", source) is not None


def _native() -> bool:
    try:
        kernel()
    except NativeUnavailableError:
        return False
    return True


def _groups(text: Any, device: torch.device) -> bool:
    """Whether heads share keys and values, and each group is work enough."""
    try:
        groups = getattr(text, "num_key_value_heads", None)
        heads = getattr(text, "num_attention_heads", None)
    except RuntimeError:  # they differ from layer to layer
        return False
    if not groups or not heads or groups >= heads:
        return False
    # Each key/value head is one unit of work on the CPU: fewer than threads are slow.
    return device.type != "cpu" or groups >= torch.get_num_threads()


for _name, _function in ((NATIVE, native_attention), (GROUPED, grouped_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)
