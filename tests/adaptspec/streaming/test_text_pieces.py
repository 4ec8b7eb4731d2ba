"""Pieces of text join to the text that the tokenizer gives all tokens together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptspec.streaming.text_pieces import TextPieces

WORDS = ["[UNK]", "<eos>", "a", "b", "n", "t", "s", "don", "it", "é", "你", "\ufffd"]
MARKS = [".", "?", "!", ",", "'", "n't", "'s", "'m", "'re"]


def wordpiece(clean: bool, decoder_cleans: bool) -> Any:
    words = [*WORDS, *MARKS, "##ing", "##t", "##'", "##."]
    model = models.WordPiece(dict(zip(words, range(99), strict=False)))
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=decoder_cleans)
    return wrapped(inner, clean)


def spaced(clean: bool) -> Any:
    """Pieces with spaces of their own; Unigram with bytes for what it doesn't know."""
    pieces = ["<unk>", "<eos>", "▁", "▁a", "b", "n", "t", "▁'", "'", "▁.", ".", "s"]
    pieces += [f"<0x{byte:02X}>" for byte in (0x0A, 0x41, 0xC3, 0xA9, 0xE4, 0xBD, 0xFF)]
    inner = Tokenizer(
        models.Unigram([(p, -1.0) for p in pieces], unk_id=0, byte_fallback=True)
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
    return wrapped(inner, clean)


def metaspace(clean: bool) -> Any:
    pieces = ["<unk>", "<eos>", "▁", "▁a", "b", "▁▁", "é", "\n", ".", "▁'", "'"]
    inner = Tokenizer(models.Unigram([(p, -1.0) for p in pieces], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return wrapped(inner, clean)


def byte_level(clean: bool) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<eos>", *alphabet, "Ġa", "Ã©", "ä½"]
    vocab = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return wrapped(inner, clean)


def suffixed(clean: bool) -> Any:
    names = ["<unk>", "<eos>", "a</w>", "b", "c</w>", ".</w>", "'</w>"]
    vocab = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(models.BPE(vocab, [], end_of_word_suffix="</w>"))
    inner.decoder = decoders.BPEDecoder()
    return wrapped(inner, clean)


def wrapped(inner: Any, clean: bool) -> Any:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        eos_token="<eos>",
        clean_up_tokenization_spaces=clean,
    )


@functools.cache
def tokenizers() -> dict[str, Any]:
    made = {
        "wordpiece": wordpiece(False, False),
        "wordpiece, cleaned by its decoder": wordpiece(False, True),
        "wordpiece, cleaned": wordpiece(True, False),
        "wordpiece, cleaned twice": wordpiece(True, True),
        "bytes cleaned in spite": byte_level(True),
    }
    name = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    setattr(made["bytes cleaned in spite"], name, True)
    for build in (spaced, metaspace, byte_level, suffixed):
        for clean in (False, True):
            made[f"{build.__name__}, clean={clean}"] = build(clean)
    return made


def streamed(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    pieces = TextPieces(tokenizer)
    given = [pieces.add([token]) for token in ids]
    return [*given, pieces.rest(tokenizer.decode(list(ids), skip_special_tokens=True))]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(tokenizers()))
@settings(max_examples=250)
@given(data=st.data())
def test_pieces_join_to_the_whole_text(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizers()[name]
    # Few tokens, so that patterns of several of them come up.
    every = st.integers(0, len(tokenizer) - 1)
    few = data.draw(st.lists(every, min_size=1, max_size=5))
    token = st.one_of(st.sampled_from(few), st.sampled_from(few), every)
    ids = data.draw(st.lists(token, max_size=60))
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def ids_of(tokenizer: Any, *names: str) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(name)) for name in names]


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer = tokenizers()["wordpiece, cleaned"]
    ids = ids_of(tokenizer, "it", "##ing", "don", "'", "t", ".", "a", "b")
    assert streamed(tokenizer, ids)[:4] == ["", "", "iting", ""]
    assert "".join(streamed(tokenizer, ids)) == "iting don't. a b"
    tokenizer = tokenizers()["byte_level, clean=False"]
    ids = ids_of(tokenizer, "a", "Ã", "©", "b")
    assert streamed(tokenizer, ids) == ["a", "", "é", "b", ""]


def test_a_later_byte_may_spoil_the_bytes_before_it() -> None:
    tokenizer = tokenizers()["spaced, clean=False"]
    run = ids_of(tokenizer, "<0xC3>", "<0xA9>")
    assert streamed(tokenizer, [*run, *ids_of(tokenizer, "b")])[2] == "éb"
    spoilt = [*run, *ids_of(tokenizer, "<0xFF>", "b")]
    assert "".join(streamed(tokenizer, spoilt)) == "\ufffd\ufffd\ufffdb"


def test_a_token_costs_the_same_however_long_the_text_is() -> None:
    tokenizer = tokenizers()["byte_level, clean=False"]
    decoded: list[int] = []

    class Counting:
        added_tokens_decoder = tokenizer.added_tokens_decoder
        convert_ids_to_tokens = staticmethod(tokenizer.convert_ids_to_tokens)

        @staticmethod
        def decode(ids: list[int], **given: Any) -> str:
            decoded.append(len(ids))
            return str(tokenizer.decode(ids, **given))

    pieces = TextPieces(Counting())
    for text in ("abc ", " ", "\xff"):
        del decoded[:]
        byte = ids_of(tokenizer, *("Ġ" if c == " " else c for c in text))
        for _ in range(400):
            pieces.add(byte)
        assert max(decoded) <= 129
        assert sum(decoded) <= 400 * len(byte) * 200
