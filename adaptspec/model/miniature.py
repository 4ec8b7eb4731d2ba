"""A tiny float32 model of the same class, with short windows, to probe in place of it.

Rounding hides what half precision gets wrong, and a window of thousands of tokens costs
too much to cross on the model itself. The code that runs is the same for a model of the
same class and configuration that is narrow, has few layers, and whose windows, chunks
and scales are a few tokens long.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

MINIATURE_VOCABULARY = 64
MINIATURE_POSITIONS = 512
WEIGHT_DEVIATION = 0.3  # of the weights, so that attention decides what comes out
FEED_FORWARD_WIDTH = 48  # of feed-forward layers
ATTENTION_HEADS = 4
MOST_EXPERTS = 8
FEWEST_LAYERS = 2
MOST_WEIGHTS = 1 << 27

# Names of fields that count tokens. Those that count layers look alike.
LENGTH_FIELDS = re.compile(
    r"window|chunk|floor_scale|block_size|local_attention|local_attn|attention_span|"
    r"context_(?:size|length)|(?:^|_)block_(?:len|length|stride)|topk_tokens|index_topk|"
    r"compress_rate|kernel_stride|segment"
)
NO_LENGTHS = re.compile(
    r"layers|pattern|interval|chunk_size_feed_forward|heads|kernel_size|window_attn_skip"
)
POSITION_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
)
# Shortest length a miniature's field is given; lower ones stay.
SHORTEST_TOKENS = 16
STEP_TOKENS = 4

FEED_FORWARD = re.compile(r"intermediate|ffn_dim|ffn_hidden|n_inner|mlp_dim|d_ff")
EXPERT_COUNTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
)


def boundaries(config: Any) -> dict[str, int]:
    """Fields of ``config`` that name a number of tokens its forward may change at.

    Whole numbers and lists of them; fields that are off (``use_<name>`` is false) and
    those as long as the whole context are left out.
    """
    longest = configured_length(config)
    found: dict[str, int] = {}
    for name, value in _fields(config).items():
        if not LENGTH_FIELDS.search(name) or NO_LENGTHS.search(name):
            continue
        if vars(config).get(f"use_{name}", True) is False:
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            if (
                type(number) is int
                and 1 < number
                and not (longest and number >= longest)
            ):
                found[name] = max(number, found.get(name, 0))
    return found


def has_experts(config: Any) -> bool:
    """Whether tokens are routed, so that they share rows with different others."""
    fields = _fields(config)
    return any(fields.get(name) for name in EXPERT_COUNTS)


def configured_length(config: Any) -> int | None:
    """Positions the configuration names, before any scaling; None if it names none."""
    for name in POSITION_FIELDS:
        value = getattr(config, name, None)
        if type(value) is int and value > 0:
            return value
    return None


def build(model: nn.Module, config: Any) -> nn.Module | None:
    """A miniature of ``model``, whose language model ``config`` describes.

    None if the class can't be built from a smaller configuration.
    """
    for small in _candidates(model, config):
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                with torch.device("meta"):
                    size = _size(_construct(type(model), copy.deepcopy(small)))
                if size > MOST_WEIGHTS:
                    continue
                with torch.device("cpu"):
                    made = _construct(type(model), small)
            except Exception:  # a constructor's own rules, whatever they raise
                continue
            return _spread(made.float().eval())
    return None


def _construct(cls: Any, config: Any) -> nn.Module:
    made = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    return made  # type: ignore[no-any-return]


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _spread(model: nn.Module) -> nn.Module:
    """Weights wide enough that every part of the forward shows in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            if (
                float(parameter.float().std()) < WEIGHT_DEVIATION / 10
                or "embed" in name
            ):
                nn.init.normal_(parameter, std=WEIGHT_DEVIATION)
    return model


def _candidates(model: nn.Module, config: Any) -> Iterator[Any]:
    """Smaller configurations, the smallest first; some classes refuse some of them."""
    whole = getattr(model, "config", config)
    for few, fewer_heads in ((True, True), (False, True), (True, False)):
        small = copy.deepcopy(whole)
        text = small.get_text_config(decoder=True)
        try:
            _shorten(text)
            _thin(text)
            if fewer_heads:
                _narrow(text)
            if few:
                _fewer(text)
            for part in vars(small).values():  # towers for pictures and sound
                if part is not text and hasattr(part, "num_hidden_layers"):
                    _put(part, "num_hidden_layers", 1)
        except Exception:  # attributes a class doesn't have, or won't let be set
            continue
        yield small


def _shorten(config: Any) -> None:
    """Windows of a few tokens, in the order of the real ones; a small vocabulary."""
    named = boundaries(config)
    values = sorted(set(named.values()))
    short = {
        value: min(value, SHORTEST_TOKENS + STEP_TOKENS * place)
        for place, value in enumerate(values)
    }
    for name in named:
        value = getattr(config, name)
        if isinstance(value, list | tuple):
            new: Any = [short.get(n, n) if type(n) is int else n for n in value]
        else:
            new = short[value]
        setattr(config, name, new)
    for name in POSITION_FIELDS:
        value = getattr(config, name, None)
        if type(value) is int and value > MINIATURE_POSITIONS:
            setattr(config, name, MINIATURE_POSITIONS)
    for name, value in _fields(config).items():
        if name.endswith("token_id") or name.endswith("token_ids"):
            if isinstance(value, int) and value >= MINIATURE_VOCABULARY:
                setattr(config, name, 0)
            elif isinstance(value, list):
                setattr(config, name, [0])
    words = config.vocab_size
    for name, value in _fields(config).items():
        if type(value) is int and (value == words or name.startswith("vocab_size")):
            setattr(config, name, MINIATURE_VOCABULARY)
    _put(config, "vocab_size", MINIATURE_VOCABULARY)


def _thin(config: Any) -> None:
    """Narrow feed-forward layers, and few experts."""
    for name, value in _fields(config).items():
        if FEED_FORWARD.search(name):
            if type(value) is int:
                setattr(config, name, min(value, FEED_FORWARD_WIDTH))
            elif isinstance(value, list | tuple) and all(type(n) is int for n in value):
                setattr(config, name, [min(n, FEED_FORWARD_WIDTH) for n in value])
        elif name in EXPERT_COUNTS and type(value) is int and value > MOST_EXPERTS:
            setattr(config, name, MOST_EXPERTS)
            for chosen in ("num_experts_per_tok", "moe_k", "top_k"):
                if type(getattr(config, chosen, None)) is int:
                    setattr(config, chosen, min(2, getattr(config, chosen)))
            for grouped in ("n_group", "topk_group"):
                if type(getattr(config, grouped, None)) is int:
                    setattr(config, grouped, 1)


def _narrow(config: Any) -> None:
    """Few heads of the same size, and hidden states as narrow as these."""
    hidden = int(config.hidden_size)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    new = hidden if heads else min(hidden, 64)
    if heads:
        size = int(getattr(config, "head_dim", None) or hidden // heads)
        fewer = min(heads, ATTENTION_HEADS)
        groups = getattr(config, "num_key_value_heads", None)
        if type(groups) is int and groups > 1:
            _put(
                config, "num_key_value_heads", fewer if groups == heads else fewer // 2
            )
        _put(config, "num_attention_heads", fewer)
        new = size * fewer
    for name, value in _fields(config).items():
        if type(value) is int and value == hidden and not name.startswith("vocab"):
            setattr(config, name, new)
    _put(config, "hidden_size", new)


def _fewer(config: Any) -> None:
    """The shortest prefix of layers with every kind of layer in it."""
    total = int(config.num_hidden_layers)
    lists = {
        name: value
        for name, value in _fields(config).items()
        if isinstance(value, list | tuple) and len(value) == total
    }
    kinds = list(zip(*(map(repr, value) for value in lists.values()), strict=True))
    count = min(total, FEWEST_LAYERS)
    if kinds:
        count = max(count, *(kinds.index(kind) + 1 for kind in set(kinds)))
    elif any(
        re.search(r"period|interval|pattern|frequency|_freq|offset|first_k", name)
        and type(value) is int
        and value > 1
        for name, value in _fields(config).items()
    ):
        count = min(total, 8)
    for name, value in lists.items():
        setattr(config, name, list(value)[:count])
    _put(config, "num_hidden_layers", count)


def _put(config: Any, name: str, value: Any) -> None:
    setattr(config, getattr(config, "attribute_map", {}).get(name, name), value)


def _fields(config: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(config).items() if not k.startswith("_")}
