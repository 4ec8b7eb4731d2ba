"""No part of a stop string is ever shown, whatever tokens and characters it crosses."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessorList, PreTrainedTokenizerFast

import adaptspec
from adaptspec.decoder import Decoder
from adaptspec.profile import PLAIN
from adaptspec.testing.fakes import tiny_module
from adaptspec_profiles.memory import MemoryStore

TEXTS = [
    "a",
    "b",
    "\n",
    " ",
    "STOP",
    "é",
    "你",
    "好",
    "👍",
    "👍🏽",
    "User:",
    "</s>",
    "aa",
]
MERGED = ["ST", "OP", "OP and", "\n\n", "你好", "User", ": ", "ab", "aab", "!\n"]
PROMPT = [1, 2, 3]


class Forced:
    """Makes the model say certain tokens."""

    def __init__(self, prompt: int, ids: Sequence[int]) -> None:
        self._prompt, self._ids = prompt, ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self._ids[input_ids.shape[1] - self._prompt]] = 0.0
        return masked


def byte_level() -> Any:
    """A token for each byte, for some longer strings, and two special ones."""
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [as_bytes.pre_tokenize_str(text)[0][0] for text in MERGED]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    inner.pre_tokenizer, inner.decoder = as_bytes, decoders.ByteLevel()
    return wrapped(inner)


def byte_fallback() -> Any:
    """Pieces with spaces of their own, and bytes for all else."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁a", "a", "b", "ST", "OP", "▁STOP", "你", "\n", "User", ":"]
    inner = Tokenizer(
        models.Unigram(
            [(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(inner)


def wrapped(inner: Tokenizer) -> Any:
    inner.add_special_tokens(
        [AddedToken(name, special=True) for name in ("</s>", "<|end|>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)  # type: ignore[no-untyped-call]


@functools.cache
def decoder(kind: str) -> Decoder:
    tokenizer = {"bytes": byte_level, "fallback": byte_fallback}[kind]()
    module = tiny_module("llama", vocab_size=len(tokenizer))
    return adaptspec.load(module, db=MemoryStore(), tokenizer=tokenizer)


def said(
    kind: str,
    ids: Sequence[int],
    stops: Sequence[str],
    prompt: Sequence[int] = PROMPT,
    **more: Any,
) -> tuple[list[str], Any]:
    """The pieces and the result of a stream in which the model says ``ids``."""
    stream = decoder(kind).stream(
        list(prompt),
        strategy=PLAIN,
        max_new_tokens=len(ids),
        stop_strings=list(stops) or None,
        logits_processor=[Forced(len(prompt), ids)],
        **more,
    )
    return list(stream), stream.result


def own(
    kind: str, ids: Sequence[int], stops: Sequence[str], prompt: Sequence[int] = PROMPT
) -> list[int]:
    """What the model's own ``generate`` makes of the same."""
    model = decoder(kind).model
    output = model.source.generate(  # type: ignore[operator]
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        max_new_tokens=len(ids),
        do_sample=False,
        pad_token_id=0,
        stop_strings=list(stops),
        tokenizer=model.tokenizer,
        logits_processor=LogitsProcessorList([Forced(len(prompt), ids)]),
    )
    return [int(token) for token in output[0, len(prompt) :]]


@st.composite
def speech(draw: st.DrawFn, kind: str) -> tuple[list[int], list[str]]:
    """Token ids that may cross anything, and stop strings that may come up in them."""
    size = len(decoder(kind).model.tokenizer)
    token = st.integers(0, size - 1) if kind == "bytes" else st.integers(1, size - 1)
    encode = functools.partial(
        decoder(kind).model.tokenizer.encode, add_special_tokens=False
    )
    written = st.sampled_from(TEXTS).map(encode)
    parts = draw(st.lists(st.one_of(written, token.map(lambda t: [t])), max_size=14))
    ids = [i for part in parts for i in part][:40] or [5]
    text = decoder(kind).model.decode(ids, skip_special=False)
    stops = []
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, max(0, len(text) - 1)))
        stop = text[first : first + draw(st.integers(1, 6))]
        stops.append(draw(st.sampled_from([stop or "x", *TEXTS])))
    return ids, [stop for stop in stops if "\ufffd" not in stop] or ["STOP"]


def spelt(*texts: str) -> list[int]:
    """Ids of texts, each tokenized alone."""
    tokenizer = decoder("bytes").model.tokenizer
    vocabulary = tokenizer.get_vocab()
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids: list[int] = []
    for text in texts:
        name = text if text.startswith("<") else as_bytes.pre_tokenize_str(text)[0][0]
        whole = vocabulary.get(name)
        ids += tokenizer.encode(text) if whole is None else [whole]
    return ids


@pytest.mark.parametrize(
    ("texts", "stops", "pieces", "finish"),
    [
        # Text behind a stop string goes with it; what only began like one is shown.
        (["a", "ST", "ab", "ST", "OP and", "b"], ["STOP"], ["a", "STab"], "stop"),
        (["b", "ST"], ["STOP"], ["b", "ST"], "length"),
        # Of two that end together, the one that begins first.
        (["b", "User", ": "], [": ", "User: "], ["b"], "stop"),
        (["aab", "ab", "a"], ["aba"], ["a"], "stop"),
        # Characters of several tokens, half of one in the stop string's first.
        (["b", "👍", "👍", "a"], ["👍👍"], ["b"], "stop"),
        (["b", "👍", "a"], ["👍👍"], ["b", "👍a"], "length"),
        # A part of it may be invisible, and so may all of it.
        (["b", "\n", "</s>", "a"], ["\n</s>"], ["b"], "stop"),
        (["b", "\n", "a"], ["\n</s>"], ["b", "\na"], "length"),
        (["b", "<|end|>", "a"], ["end"], ["b"], "stop"),
    ],
)
def test_stop_strings_are_held_back_until_it_is_certain_what_they_are(
    texts: list[str], stops: list[str], pieces: list[str], finish: str
) -> None:
    ids = spelt(*texts)
    found, result = said("bytes", ids, stops)
    assert (found, result.finish) == (pieces, finish)
    assert result.text == "".join(pieces)
    assert result.token_ids == own("bytes", ids, stops)
    whole = decoder("bytes").model.decode(result.token_ids)
    assert said("bytes", ids, stops, include_stop=True)[1].text == whole
    generated = decoder("bytes").generate(
        PROMPT,
        strategy=PLAIN,
        max_new_tokens=len(ids),
        stop_strings=stops,
        logits_processor=[Forced(len(PROMPT), ids)],
    )
    assert (generated.text, generated.token_ids) == (result.text, result.token_ids)


@pytest.mark.parametrize(
    ("prompt", "texts", "stops", "text"),
    [
        (["a", "ST"], ["OP", "b"], ["STOP"], ""),
        (["a", "ST"], ["a", "OP", "b"], ["STOP"], "aOPb"),
        (["a", "STOP"], ["b", "OP"], ["STOP"], "bOP"),
        (["\n"], ["\n", "b", "\n\n", "a"], ["\n\n"], ""),
        (["\n", "</s>"], ["\n", "b", "\n\n", "a"], ["\n\n"], "\nb"),
        (["STOP"], ["a", "STOP"], ["STOP"], "a"),
    ],
)
def test_a_stop_string_may_begin_in_the_prompt_as_for_generate(
    prompt: list[str], texts: list[str], stops: list[str], text: str
) -> None:
    ids, before = spelt(*texts), spelt(*prompt)
    pieces, result = said("bytes", ids, stops, before)
    assert "".join(pieces) == result.text == text
    assert result.token_ids == own("bytes", ids, stops, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "fallback"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_text_and_never_show_a_stop_string(
    kind: str, data: st.DataObject
) -> None:
    ids, stops = data.draw(speech(kind))
    pieces, result = said(kind, ids, stops)
    assert "".join(pieces) == result.text
    whole = decoder(kind).model.decode(result.token_ids)
    assert whole.startswith(result.text)
    if result.finish != "stop":
        assert result.text == whole
    elif not any("<" in stop or ">" in stop for stop in stops):
        output = [*PROMPT, *result.token_ids]
        raw = decoder(kind).model.decode(output, skip_special=False)
        # One may begin in the prompt, but doesn't count where it ends there.
        before = len(decoder(kind).model.decode(PROMPT, skip_special=False))
        places = (raw.find(stop, max(0, before - len(stop) + 1)) for stop in stops)
        start = min(place for place in places if place >= 0)
        # A stop string may begin within a special token, of which nothing is shown.
        hidden = {
            place
            for found in re.finditer(r"</s>|<\|end\|>", raw)
            for place in range(*found.span())
        }
        shown = (place for place in range(start, len(raw)) if place not in hidden)
        cut = "".join(raw[place] for place in shown)
        # A decoder may drop a space in front of all that is shown.
        assert (result.text + cut).lstrip(" ") == whole.lstrip(" ")
    kept, with_stop = said(kind, ids, stops, include_stop=True)
    assert "".join(kept) == with_stop.text == whole
    assert with_stop.token_ids == result.token_ids


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_token_ids_are_those_of_the_models_own_generate(data: st.DataObject) -> None:
    ids, stops = data.draw(speech("bytes"))
    at = data.draw(st.integers(0, len(ids) - 1))
    prompt, ids = [*PROMPT, *ids[:at]], ids[at:]
    pieces, result = said("bytes", ids, stops, prompt)
    assert result.token_ids == own("bytes", ids, stops, prompt)
    assert "".join(pieces) == result.text
