"""Every field of transformers' ``GenerationConfig``, and what becomes of it here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from adaptspec.errors import UnsupportedControlError

Effect = Literal["honoured", "refused", "none"]


@dataclass(frozen=True)
class Field:
    """What one field does.

    Args:
        effect: ``honoured`` as ``generate`` does; ``refused`` unless it is one of
            ``neutral``; ``none``: it can't change which tokens come out.
        note: What it does here, or why it is refused or without effect.
        neutral: Of a refused field: the values that are accepted, the last of which
            switches it off.
    """

    effect: Effect
    note: str
    neutral: tuple[Any, ...] = (None,)


def _honoured(note: str) -> Field:
    return Field("honoured", note)


def _without(note: str) -> Field:
    return Field("none", note)


def _refused(note: str, *neutral: Any) -> Field:
    return Field("refused", note, (None, *neutral))


SEARCH = "one verified pass follows one sequence"
BEAMS = "only beam search reads it"
DRAFTS = "how `generate` drafts; a strategy drafts here"
CACHE = "where keys and values are kept"
OUTPUT = "tokens come out the same; nothing beside them is kept"
PROMPT = "the prompt is decoded as it is given"
COMPILED = "how `generate` is compiled; here `load(compile=True)` asks for it"

FIELDS: Mapping[str, Field] = {
    # How long the output is.
    "max_new_tokens": _honoured("most new tokens; goes before `max_length`"),
    "max_length": _honoured("most tokens, those of the prompt included"),
    "min_new_tokens": _honoured("no end of sequence before so many new tokens"),
    "min_length": _honoured("the same, those of the prompt included"),
    "max_time": _honoured("seconds; the step under way is finished; `finish`: `time`"),
    "stop_strings": _honoured(
        "the output ends with the token that completes one; its text ends before it"
    ),
    "early_stopping": _without(BEAMS),
    # How tokens are chosen.
    "do_sample": _honoured("False is greedy, whatever the temperature"),
    "temperature": _honoured("given without `do_sample`, above 0 samples, 0 is greedy"),
    "top_k": _honoured("of sampling; 50 where nothing sets it; 0 keeps all tokens"),
    "top_p": _honoured("of sampling"),
    "min_p": _honoured("of sampling"),
    "top_h": _honoured("of sampling"),
    "typical_p": _honoured("of sampling"),
    "epsilon_cutoff": _honoured("of sampling"),
    "eta_cutoff": _honoured("of sampling"),
    "repetition_penalty": _honoured("1 is none"),
    "no_repeat_ngram_size": _honoured("0 is none"),
    "bad_words_ids": _honoured("sequences that aren't emitted"),
    "sequence_bias": _honoured("added to the scores of sequences"),
    "suppress_tokens": _honoured("tokens that aren't emitted"),
    "begin_suppress_tokens": _honoured("tokens that don't come first"),
    "forced_bos_token_id": _honoured("the token after a prompt of one token"),
    "forced_eos_token_id": _honoured("the last token where the length ends the output"),
    "exponential_decay_length_penalty": _honoured("raises the end of sequence"),
    "remove_invalid_values": _honoured("replaces NaN and infinite scores"),
    "renormalize_logits": _honoured("scores become log probabilities"),
    "eos_token_id": _honoured("any of them ends the output; None: none does"),
    # Other searches, other models.
    "num_beams": _refused(SEARCH, 1),
    "num_return_sequences": _refused(SEARCH, 1),
    "constraints": _refused(SEARCH),
    "force_words_ids": _refused(SEARCH),
    "penalty_alpha": _refused(SEARCH, 0.0),
    "dola_layers": _refused("it contrasts layers of the model"),
    "guidance_scale": _refused("it takes a second pass without the prompt", 1.0),
    "token_healing": _refused("it changes the prompt", False),
    "watermarking_config": _refused("watermarks aren't set"),
    "encoder_repetition_penalty": _refused("it is a control of encoders", 1.0),
    "encoder_no_repeat_ngram_size": _refused("it is a control of encoders", 0),
    "is_assistant": _refused("it ends the output where the model is unsure", False),
    "num_beam_groups": _without(BEAMS),
    "diversity_penalty": _without(BEAMS),
    "length_penalty": _without(BEAMS),
    # Speculation of transformers' own.
    "use_mtp": _without(DRAFTS),
    "num_assistant_tokens": _without(DRAFTS),
    "num_assistant_tokens_schedule": _without(DRAFTS),
    "assistant_confidence_threshold": _without(DRAFTS),
    "assistant_early_exit": _without(DRAFTS),
    "assistant_lookbehind": _without(DRAFTS),
    "target_lookbehind": _without(DRAFTS),
    "assistant_ensemble_weight": _without(DRAFTS),
    "prompt_lookup_num_tokens": _without(DRAFTS),
    "max_matching_ngram_size": _without(DRAFTS),
    "speculation_type": _without(DRAFTS),
    # How it is computed.
    "use_cache": _without(CACHE),
    "cache_implementation": _refused(
        "quantised keys and values would change tokens; any other cache is accepted",
        *("static", "offloaded_static", "dynamic", "dynamic_full", "offloaded"),
        *("sliding_window", "hybrid", "hybrid_chunked", "paged"),
        *("offloaded_hybrid", "offloaded_hybrid_chunked", None),
    ),
    "cache_config": _without(CACHE),
    "max_cache_len": _without(CACHE),
    "low_memory": _without(CACHE),
    "prefill_chunk_size": _without("how the prompt is read"),
    "compile_config": _without(COMPILED),
    "disable_compile": _without(COMPILED),
    "continuous_batching_config": _without("one sequence is decoded at a time"),
    # What is returned.
    "output_attentions": _without(OUTPUT),
    "output_hidden_states": _without(OUTPUT),
    "output_scores": _without(OUTPUT),
    "output_logits": _without(OUTPUT),
    "return_dict_in_generate": _without(OUTPUT),
    # Other special tokens, and where the configuration comes from.
    "pad_token_id": _without("one sequence needs no padding"),
    "bos_token_id": _without(PROMPT),
    "decoder_start_token_id": _without(PROMPT),
    "transformers_version": _without("who wrote the configuration"),
    "_from_model_config": _without("who wrote the configuration"),
}

ASSISTED = "AdaptSpec drafts by itself"
ATTENDED = "attentions and hidden states aren't kept"

# Where it differs inside transformers' own ``generate``: see :mod:`adaptspec.drop_in`.
DROP_IN: Mapping[str, Field] = {
    "max_time": _honoured("seconds since the call; asked at each accepted token"),
    "top_k": _honoured("of sampling; as `generate` fills it in"),
    "temperature": _honoured("of sampling, which `do_sample=True` alone asks for"),
    "num_return_sequences": _honoured("each row is decoded by itself"),
    "guidance_scale": _honoured("one prompt at a time; nothing is drafted for less"),
    "watermarking_config": _honoured("as `generate` does; SynthID for one prompt"),
    "encoder_repetition_penalty": _honoured("as `generate` does, of the prompt"),
    "encoder_no_repeat_ngram_size": _honoured("as `generate` does, of the prompt"),
    "return_dict_in_generate": _honoured("without a cache"),
    "output_scores": _honoured("0 for rows that have ended"),
    "output_logits": _honoured("0 for rows that have ended"),
    "output_attentions": _refused(ATTENDED, False),
    "output_hidden_states": _refused(ATTENDED, False),
    "pad_token_id": _honoured("stands behind rows that have ended"),
    "bos_token_id": _honoured("the prompt where none is given"),
    "use_mtp": _refused(ASSISTED, False),
    "prompt_lookup_num_tokens": _refused(ASSISTED),
    "assistant_early_exit": _refused(ASSISTED),
    "assistant_ensemble_weight": _refused(ASSISTED),
    "speculation_type": _refused(ASSISTED),
}

# Overrides under which no stored field is refused and none depends on the clock: what
# measures decoding, or asks for the ends of the output alone, passes them.
ONE_SEQUENCE: Mapping[str, Any] = {
    "max_time": None,
    **{
        name: field.neutral[-1]
        for name, field in FIELDS.items()
        if field.effect == "refused"
    },
}


def refuse_unsupported(values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse the first of ``values`` that can't be honoured.

    Args:
        values: Fields in force.
        given: Those of them that the caller named; the others are the model's own.

    Raises:
        UnsupportedControlError: with the value that is accepted.
    """
    for name, value in values.items():
        field = FIELDS.get(name)
        if field is None or field.effect != "refused":
            continue
        if any(value is one or value == one for one in field.neutral):
            continue
        off = field.neutral[-1]
        origin = "given" if name in given else "in the model's generation_config"
        raise UnsupportedControlError(
            f"{name}={value!r} ({origin}) can't be honoured: {field.note}; pass "
            f"{name}={off!r} (adaptspec generate --control {name} {json.dumps(off)})"
        )
