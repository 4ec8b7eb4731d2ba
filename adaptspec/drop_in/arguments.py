"""What ``generate`` was asked for: refuse what can't be honoured, split the rows."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin

from adaptspec.decoding.controls import foreign_fields
from adaptspec.decoding.generation_fields import DROP_IN, FIELDS
from adaptspec.errors import UnsupportedControlError
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.views import drops, unwrapped

CACHES = ("cache", "past_key_values", "cache_params")

# Arguments of the model's forward that ``generate`` prepares itself, and that each
# verified pass sets anew.
PREPARED = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHES)
# What transformers encodes before a decoder is asked, and the argument it comes in.
PICTURES = {"image": "pixel_values", "video": "pixel_values_videos"}
# Of the configuration, too, where they are looked at.
CONFIGURED = ("output_attentions", "output_hidden_states")


class Row(NamedTuple):
    """One prompt of a batch: what stands before it, and its own ids."""

    padding: list[int]
    ids: list[int]


def refusal(name: str, value: Any, why: str, way: str) -> UnsupportedControlError:
    """One line that names an argument, its value, the reason and the way out."""
    shown = repr(value)
    if isinstance(value, torch.Tensor):
        shown = f"a tensor of shape {list(value.shape)}"
    elif len(shown) > 60:
        shown = type(value).__name__
    return UnsupportedControlError(f"{name}={shown} can't be honoured: {why}; {way}")


def check_model(model: LanguageModel, called: Any) -> None:
    """Refuse a model that isn't the decoder's, or that drops activations at random.

    Args:
        called: The object whose ``generate`` was called.
    """
    source: Any = model.source
    base = getattr(source, "get_base_model", None)  # of a model with adapters
    known = [source] if base is None else [source, base()]
    if not any(unwrapped(called) is one for one in known):
        raise UnsupportedControlError(
            f"the decoder must be of the model that generates: it is of {model.name}, "
            "loaded apart; pass the loaded model itself to adaptspec.load or speed_up"
        )
    if source.training and drops(source):
        raise UnsupportedControlError(
            f"{model.name} drops activations at random, since it is in training mode; "
            "call its eval() before generate"
        )


def refuse_dropped(caller: FrameType | None) -> None:
    """Refuse what ``generate`` was given and doesn't hand on to a callable.

    Unseen, an iterator over a streamer's text would wait for ever.

    Args:
        caller: Who calls; anyone but transformers' ``generate`` is let pass.
    """
    if caller is None or caller.f_code is not _generate_code():
        return
    for name in ("streamer", "assistant_model", "synced_gpus"):
        value = caller.f_locals.get(name)
        if value is None or value is False:
            continue
        way = "leave it out; AdaptSpec drafts by itself"
        if name == "streamer":
            way = "call adaptspec.speed_up(model), then generate without it"
        why = "transformers doesn't hand it on to custom_generate"
        raise refusal(name, value, why, way)


@functools.cache
def _generate_code() -> CodeType:
    code: CodeType = inspect.unwrap(GenerationMixin.generate).__code__
    return code


def check_configuration(config: Any) -> None:
    """Refuse fields of a prepared ``GenerationConfig``.

    Raises:
        UnsupportedControlError: for the first that can't be honoured.
    """
    returns = bool(config.return_dict_in_generate)
    for name, value in vars(config).items():
        if value is None or name.startswith("_"):
            continue
        field = DROP_IN.get(name) or FIELDS.get(name)
        if field is None:
            if name in foreign_fields():
                why = "this version of adaptspec doesn't know it"
                raise refusal(name, value, why, f"pass {name}=None")
            continue  # entries that transformers itself carries along unread
        if field.effect != "refused" or any(value == one for one in field.neutral):
            continue
        if name in CONFIGURED and not returns:
            continue  # generate reads it for the returned dictionary alone
        raise refusal(name, value, field.note, f"pass {name}={field.neutral[-1]!r}")


def check_inputs(input_ids: torch.Tensor, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of the model's forward that a row can't be decoded with.

    Args:
        input_ids: ``[rows, length]``.
        arguments: As ``generate`` hands them on.

    Raises:
        UnsupportedControlError: for the first of them.
    """
    for name, value in arguments.items():
        if value is None or name in PREPARED or name in CONFIGURED:
            continue
        if isinstance(value, Mapping) and not value:
            continue  # of pictures, where there are none
        if name == "inputs_embeds":
            why = "drafts and verification are of token ids"
            raise refusal(name, value, why, "pass input_ids")
        if name == "mm_encoder_outputs":  # what generate has made of pictures
            pictures = [PICTURES.get(kind, kind) for kind in value]
            raise UnsupportedControlError(
                f"{' and '.join(pictures)} can't be honoured: rows are decoded from "
                "input_ids alone, without pictures; leave it out, or let the model's "
                "own generate (after restore()) read them"
            )
        why = "rows are decoded from input_ids alone"
        raise refusal(name, value, why, "leave it out")
    for name in CACHES:
        cache = arguments.get(name)
        if cache is not None and getattr(cache, "_is_user_defined", False):
            raise refusal(
                name,
                cache,
                "a decoder keeps a cache of its own and reads the whole prompt",
                "leave it out and pass the whole text as input_ids",
            )
    if input_ids.numel() == 0:
        way = "pass at least one row of at least one token"
        raise refusal("input_ids", input_ids, "there is nothing to decode", way)
    given = arguments.get("position_ids")
    mask = arguments.get("attention_mask")
    # Of a mask of ones transformers hands on the positions alone.
    for made in (mask, given):
        if made is not None and made.shape[-1] != input_ids.shape[1]:
            raise UnsupportedControlError(
                "attention_mask and position_ids must be as long as input_ids, "
                f"{input_ids.shape[1]}, got {made.shape[-1]}; pass them as the "
                "tokenizer makes them, or leave them out"
            )
    if given is not None and not _counted(given, input_ids, mask):
        why = "positions are those that generate works out of the attention mask"
        raise refusal("position_ids", given, why, "leave it out")


def rows_of(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[Row]:
    """The rows without the padding on their left.

    Args:
        input_ids: ``[rows, length]``.
        mask: ``[rows, length]``, 0 at padding; None: there is none.

    Raises:
        UnsupportedControlError: for padding elsewhere, or nothing else.
    """
    lines: list[list[int]] = input_ids.tolist()
    if mask is None:
        return [Row([], line) for line in lines]
    if mask.shape != input_ids.shape:
        why = f"it must have the shape of input_ids, {list(input_ids.shape)}"
        raise refusal("attention_mask", mask, why, "pass it as the tokenizer makes it")
    rows = []
    for number, (line, marks) in enumerate(zip(lines, mask.tolist(), strict=True)):
        start = next((place for place, mark in enumerate(marks) if mark), len(line))
        if not all(mark == 1 for mark in marks[start:]) or start == len(line):
            raise UnsupportedControlError(
                f"row {number} of attention_mask must be zeros, then at least one 1: "
                "pad on the left (tokenizer.padding_side = 'left'), or pass "
                "attention_mask=torch.ones_like(input_ids)"
            )
        rows.append(Row(line[:start], line[start:]))
    return rows


def _counted(
    positions: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor | None
) -> bool:
    """Whether ``positions [..., length]`` are those that ``generate`` works out."""
    marks = torch.ones_like(input_ids) if mask is None else mask.long()
    expected = (marks.cumsum(-1) - 1).masked_fill(marks == 0, 0).cpu()
    lines = positions.reshape(-1, positions.shape[-1]).cpu()
    times = math.ceil(len(lines) / len(expected))  # some models have several kinds
    return torch.equal(lines, expected.repeat(times, 1)[: len(lines)])
