"""What transformers' ``generate`` calls once everything is prepared."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.prepared import Prepared, Recorded
from adaptspec.drop_in.arguments import (
    Row,
    check_configuration,
    check_inputs,
    check_model,
    refusal,
    rows_of,
)
from adaptspec.drop_in.batch import RowDecoding, decode_row, decode_rows, stacked
from adaptspec.drop_in.by_row import Endings, endings, row_processors
from adaptspec.drop_in.noise import Noise
from adaptspec.model.language_model import LanguageModel
from adaptspec.streaming.stream import Result, Stream


class Opens(Protocol):
    """Begins to decode one row."""

    def __call__(self, ids: list[int], controls: Controls) -> Stream:
        """The stream of its tokens."""


def decode_prepared(
    target: LanguageModel,
    opens: Opens,
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    generation_config: Any,
    streamer: Any,
    arguments: Mapping[str, Any],
) -> tuple[torch.Tensor | GenerateDecoderOnlyOutput, list[Result]]:
    """Decode a batch as ``generate`` would, with what it prepared.

    Args:
        opens: Begins a row.
        model: The object whose ``generate`` was called.
        input_ids: ``[rows, length]``, padded on the left.
        streamer: Gets accepted tokens: ids ``[count]`` of a single row, else one of
            each row, ``[rows]``. It has had the prompt.
        arguments: Of the model's forward.

    Returns:
        What ``generate`` returns, and the result of each row.

    Raises:
        UnsupportedControlError: for an argument that can't be honoured, by its name.
        AdaptSpecError: as decoding raises it.
    """
    check_model(target, model)
    check_configuration(generation_config)
    check_inputs(input_ids, arguments)
    rows = rows_of(input_ids, arguments.get("attention_mask"))
    if len(rows) > 1 and (reason := target.unverifiable) is not None:
        why = f"rows may change each other's logits in {target.name}, as {reason}"
        raise refusal("input_ids", input_ids, why, "pass one row at a time")
    ends = endings(stopping_criteria, len(rows))
    pad = _pad(generation_config)
    if ends.pads and pad is None:
        why = "rows that have ended are filled up with it"
        raise refusal("pad_token_id", None, why, "pass the id of a token")
    asked, limit = _limits(target, rows, input_ids.shape[1], ends, generation_config)
    sampled = bool(generation_config.do_sample)
    device = input_ids.device
    noise = Noise(len(rows), device) if sampled else None
    returns = bool(generation_config.return_dict_in_generate)
    with ExitStack() as stack:
        decodings = []
        for number, row in enumerate(rows):
            recorded = Recorded(
                returns and bool(generation_config.output_scores),
                returns and bool(generation_config.output_logits),
            )
            prepared = Prepared(
                device,
                row_processors(logits_processor, number, len(rows)),
                ends.own,
                row.padding,
                None if noise is None else noise.of_row(number, len(row.ids)),
                recorded,
            )
            controls = Controls(
                max_new_tokens=limit,
                temperature=1.0 if sampled else 0.0,
                eos_token_ids=ends.eos_token_ids,
                seed=None if noise is None else noise.seed() + number,
                prepared=prepared,
            )
            stream = stack.enter_context(opens(row.ids, controls))
            decodings.append(RowDecoding(stream, recorded))
        emit = (lambda tokens: None) if streamer is None else streamer.put
        if len(rows) == 1:
            emitted = decode_row(decodings[0], noise, emit)
        else:
            emitted = decode_rows(decodings, ends, pad, input_ids, noise, emit)
        results = [decoding.result(target) for decoding in decodings]
    steps = len(emitted[0])
    if noise is not None:
        noise.rewind(steps)
    if steps == limit < asked and any(one.finish == "length" for one in results):
        warnings.warn(
            f"the output ends after {steps} tokens in place of {asked}: {target.name} "
            f"was made for {target.max_length} positions",
            stacklevel=3,
        )
    if streamer is not None:
        streamer.end()
    new = torch.tensor(emitted, device=device)
    sequences = torch.cat([input_ids, new], -1)
    if not returns:
        return sequences, results
    kept = [decoding.recorded for decoding in decodings]
    output = GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=stacked([one.scores for one in kept], steps)
        if kept[0].keep_scores
        else None,
        logits=stacked([one.logits for one in kept], steps)
        if kept[0].keep_logits
        else None,
    )
    return output, results


def _pad(config: Any) -> int | None:
    prepared = getattr(config, "_pad_token_tensor", None)
    value = config.pad_token_id if prepared is None else prepared
    return None if value is None else int(value)


def _limits(
    target: LanguageModel, rows: Sequence[Row], width: int, ends: Endings, config: Any
) -> tuple[int, int]:
    """New tokens asked for, and those the model has positions for in every row."""
    most = config.max_length if ends.max_length is None else ends.max_length
    asked = max(1, int(most) - width)  # criteria are asked behind the first token
    longest = max(len(row.ids) for row in rows)
    if target.max_length is None or target.max_length <= longest:
        return asked, asked  # where there is no room the engine says so
    return asked, min(asked, target.max_length - longest)
