"""Streams end, are given up, fail and are looked at midway, and say so."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptspec
from adaptspec.decoder import Decoder
from adaptspec.knowledge import KnowledgeKeeper
from adaptspec.model.cache import TreeCache
from adaptspec.profile import PLAIN
from adaptspec.strategy import Context, Drafter, Strategy, Target, TokenTree
from adaptspec.testing.fakes import random_ids, tiny_module, tiny_tokenizer
from adaptspec_profiles.memory import MemoryStore

PROMPT = random_ids(12)
ASKED: dict[str, Any] = {"strategy": "prompt_lookup", "max_new_tokens": 20}


@pytest.fixture
def decoder() -> Decoder:
    module = tiny_module("llama")
    return adaptspec.load(module, db=MemoryStore(), tokenizer=tiny_tokenizer())


def test_finishing_after_a_piece_decodes_the_rest(decoder: Decoder) -> None:
    whole = decoder.generate(PROMPT, **ASKED)
    stream = decoder.stream(PROMPT, **ASKED)
    first = next(stream)
    stream.finish()
    stream.finish()
    assert stream.result.token_ids == whole.token_ids
    assert stream.result.finish == whole.finish == "length"
    assert first + "".join(stream) == whole.text
    assert next(stream, None) is None


def test_a_stream_read_midway_says_that_it_isnt_finished(decoder: Decoder) -> None:
    whole = decoder.generate(PROMPT, **ASKED)
    stream = decoder.stream(PROMPT, **ASKED)
    assert (stream.result.text, stream.result.finish) == ("", "unfinished")
    read = next(stream) + next(stream)
    result = stream.result
    assert result.finish == "unfinished"
    assert result.text == read
    assert whole.token_ids[: len(result.token_ids)] == result.token_ids
    assert read + "".join(stream) == whole.text
    assert stream.result.finish == "length"


def test_a_stream_given_up_says_so_and_frees_its_cache(
    decoder: Decoder, caches: list[weakref.ref[TreeCache]]
) -> None:
    gc.disable()
    try:
        with decoder.stream(PROMPT, **ASKED) as stream:
            read = next(stream)
            assert any(cache() is not None for cache in caches)
        assert all(cache() is None for cache in caches)
        stream.close()
        assert list(stream) == []
        assert (stream.result.text, stream.result.finish) == (read, "unfinished")
        dropped = decoder.stream(PROMPT, **ASKED)
        next(dropped)
        del dropped
        assert all(cache() is None for cache in caches)
        ended = decoder.stream(PROMPT, **ASKED)
        ended.finish()
        assert all(cache() is None for cache in caches)
    finally:
        gc.enable()


def test_a_stream_closed_before_its_first_piece_is_empty(decoder: Decoder) -> None:
    stream = decoder.stream(PROMPT, **ASKED)
    stream.close()
    stream.finish()
    assert list(stream) == []
    assert (stream.result.token_ids, stream.result.finish) == ([], "unfinished")


def test_a_stream_can_be_closed_after_its_end(decoder: Decoder) -> None:
    stream = decoder.stream(PROMPT, **ASKED)
    text = "".join(stream)
    stream.close()
    assert (stream.result.text, stream.result.finish) == (text, "length")


@pytest.mark.parametrize("end", ["read", "finish", "close", "drop", "never started"])
def test_what_was_learnt_is_kept_however_a_stream_ends(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refreshed: list[KnowledgeKeeper] = []
    monkeypatch.setattr(
        KnowledgeKeeper, "refresh", lambda keeper: refreshed.append(keeper)
    )
    monkeypatch.setattr(MemoryStore, "folder", tmp_path)
    decoder = adaptspec.load(
        tiny_module("llama"), db=MemoryStore(), tokenizer=tiny_tokenizer(), learn=True
    )
    stream: Any = decoder.stream(PROMPT, **ASKED)
    if end != "never started":
        next(stream)
    assert not refreshed
    if end == "read":
        list(stream)
    elif end == "finish":
        stream.finish()
    elif end == "close":
        stream.close()
        stream.close()
    del stream
    assert len(refreshed) == 1


class Failing(Strategy):
    """Fails in the third step; counts what is opened and closed."""

    name = "failing"
    summary = "fails"

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.open = 0, 0

    def start(self, target: Target) -> Drafter:
        self.open += 1
        return _Failing(self)


class _Failing(Drafter):
    def __init__(self, strategy: Failing) -> None:
        self._strategy = strategy

    def propose(self, context: Context) -> TokenTree:
        self._strategy.steps += 1
        if self._strategy.steps == 3:
            raise RuntimeError("no more ideas")
        return TokenTree.root_only(context.ids[-1])

    def close(self) -> None:
        self._strategy.open -= 1


@pytest.fixture
def failing(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Failing:
    strategy = Failing()
    monkeypatch.setattr(decoder, "_strategy", lambda choice: strategy)
    return strategy


@pytest.mark.slow
def test_an_error_is_raised_once_and_what_was_decoded_stays(
    decoder: Decoder, failing: Failing, caches: list[weakref.ref[TreeCache]]
) -> None:
    stream = decoder.stream(PROMPT, strategy=PLAIN, max_new_tokens=9)
    read = [next(stream) for _ in range(3)]
    with pytest.raises(RuntimeError, match="no more ideas"):
        next(stream)
    assert len(stream.result.token_ids) == 3
    assert stream.result.finish == "unfinished"
    assert failing.open == 0
    assert "".join([*read, *stream]) == stream.result.text
    stream.finish()
    stream.close()
    gc.collect()
    assert all(cache() is None for cache in caches)


def test_a_stream_works_without_a_tokenizer() -> None:
    decoder = adaptspec.load(tiny_module("llama"), db=MemoryStore())
    stream = decoder.stream(torch.tensor([PROMPT]), **ASKED)
    assert list(stream) == []
    assert len(stream.result.token_ids) == 20
