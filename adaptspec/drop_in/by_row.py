"""A batch's processors and stopping criteria, as each row's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    WatermarkLogitsProcessor,
)
from transformers.generation import logits_process as hf

from adaptspec.decoding.processing import PURE
from adaptspec.drop_in.arguments import refusal

# Processors that a field of the configuration makes and that look at all rows: the
# field, and the value to name.
OF_ALL_ROWS: Mapping[type, tuple[str, Callable[[Any], Any]]] = {
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor: (
        "guidance_scale",
        lambda processor: processor.guidance_scale,
    ),
    hf.SynthIDTextWatermarkLogitsProcessor: (
        "watermarking_config",
        lambda processor: SynthIDTextWatermarkingConfig(
            processor.ngram_len, processor.keys.tolist()
        ),
    ),
}
# Attributes of transformers' processors that have a row for each row or prompt.
ROW_BY_ROW = ("prompt_ignore_length", "encoder_input_ids")
ONE_ROW = "pass one prompt at a time, and num_return_sequences=1"
# Functions of a row alone, and of the clock.
OF_ONE_ROW = (MaxTimeCriteria, StopStringCriteria)


def row_processors(processors: Sequence[Any], row: int, rows: int) -> list[Any]:
    """What ``processors`` are for one row of a batch.

    Raises:
        UnsupportedControlError: for one that may look at the other rows.
    """
    if rows == 1:
        return list(processors)
    return [_of_row(processor, row, rows) for processor in processors]


def _of_row(processor: Any, row: int, rows: int) -> Any:
    kind = type(processor)
    if kind is hf.PrefixConstrainedLogitsProcessor:
        allowed, beams = processor._prefix_allowed_tokens_fn, processor._num_beams

        def of_row(_: int, ids: torch.Tensor) -> Any:
            return allowed(row // beams, ids)

        return hf.PrefixConstrainedLogitsProcessor(of_row, 1)
    if kind is hf.EncoderNoRepeatNGramLogitsProcessor:
        own = copy.copy(processor)
        prompt = row * processor.batch_size // rows
        own.batch_size = 1
        own.generated_ngrams = [processor.generated_ngrams[prompt]]
        return own
    if kind in OF_ALL_ROWS:
        name, value_of = OF_ALL_ROWS[kind]
        why = f"a batch is decoded row by row, and it looks at all rows, here {rows}"
        raise refusal(name, value_of(processor), why, ONE_ROW)
    if kind not in PURE and kind is not WatermarkLogitsProcessor:
        raise refusal(
            "logits_processor",
            [processor],
            f"a batch is decoded row by row, and {kind.__name__} may look at all rows, "
            f"here {rows}",
            ONE_ROW,
        )
    for name in ROW_BY_ROW:
        value = getattr(processor, name, None)
        if isinstance(value, torch.Tensor):
            processor = copy.copy(processor)
            at = row * len(value) // rows  # there may be one for each prompt only
            setattr(processor, name, value[at : at + 1])
    return processor


@dataclass(frozen=True)
class Endings:
    """Stopping criteria, by who asks them.

    Args:
        max_length: Most ids of a row, padding included; None: no criterion says.
        eos_token_ids: Any of them ends a row.
        own: Asked of each row by itself, at each of its tokens.
        shared: Asked of the whole batch at each step.
        pads: Whether a row that has ended gets the padding id. Otherwise it goes on
            until all have ended, as ``generate`` has it.
    """

    max_length: int | None
    eos_token_ids: tuple[int, ...]
    own: tuple[Any, ...]
    shared: tuple[Any, ...]
    pads: bool


def endings(criteria: Sequence[Any], rows: int) -> Endings:
    """Sort the criteria of a batch."""
    limits = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
    ends = [one for one in criteria if type(one) is EosTokenCriteria]
    others = [
        one
        for one in criteria
        if type(one) not in (MaxLengthCriteria, EosTokenCriteria)
    ]
    pads = any(hasattr(one, "eos_token_id") for one in criteria)
    if rows == 1:
        own, shared = others, []
    elif pads:
        own = [one for one in others if type(one) in OF_ONE_ROW]
        shared = [one for one in others if type(one) not in OF_ONE_ROW]
    else:
        own, shared = [], others
    return Endings(
        min(limits, default=None),
        tuple(int(token) for one in ends for token in one.eos_token_id.tolist()),
        tuple(own),
        tuple(shared),
        pads,
    )
