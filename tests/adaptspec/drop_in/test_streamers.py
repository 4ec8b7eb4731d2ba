"""Streamers get the prompt, each accepted token, and one end; readers may stop."""

from __future__ import annotations

import asyncio
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    AsyncTextIteratorStreamer,
    TextIteratorStreamer,
    TextStreamer,
)

from adaptspec.drop_in.speed_up import SpeedUp
from adaptspec.drop_in.streamers import AsyncClosableStreamer, ClosableStreamer
from adaptspec.model.cache import TreeCache
from adaptspec.testing.fakes import random_ids, tiny_module, tiny_tokenizer
from foretold import Foretold, foretold, tell

PROMPT = torch.tensor([random_ids(12)])
ASKED: dict[str, Any] = {"inputs": PROMPT, "max_new_tokens": 30, "do_sample": False}
TOKENIZER = tiny_tokenizer()


@functools.cache
def fast() -> SpeedUp:
    return foretold(tiny_module("llama"), TOKENIZER)


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The model's own output, which is drafted, too."""
    output: torch.Tensor = fast().model.generate(**ASKED)
    tell(monkeypatch, output, 12)
    return output


class Notes:
    """Remembers what it gets, and may fail.

    Args:
        fails: The call of ``put`` that raises, the prompt's being the first.
    """

    def __init__(self, fails: int | None = None) -> None:
        self.got: list[torch.Tensor] = []
        self.ends = 0
        self._fails = fails

    def put(self, value: torch.Tensor) -> None:
        assert not self.ends
        if len(self.got) + 1 == self._fails:
            raise ConnectionError("nobody listens")
        self.got.append(value)

    def end(self) -> None:
        self.ends += 1


def test_a_streamer_gets_the_prompt_then_accepted_tokens_then_one_end(
    expected: torch.Tensor,
) -> None:
    notes = Notes()
    output = fast()(**ASKED, streamer=notes)
    assert torch.equal(output, expected)
    prompt, *pieces = notes.got
    assert torch.equal(prompt, PROMPT)
    assert all(piece.dim() == 1 and piece.device.type == "cpu" for piece in pieces)
    assert torch.cat(pieces).tolist() == expected[0, 12:].tolist()
    assert 1 < len(pieces) < 30
    assert notes.ends == 1


def test_a_streamer_of_a_batch_gets_one_token_of_each_row_as_in_generate() -> None:
    batch = torch.tensor([random_ids(12), random_ids(12, seed=1)])
    speedup = fast()
    told = []
    for call in (speedup.model.generate, speedup):
        notes = Notes()
        call(inputs=batch, max_new_tokens=6, do_sample=False, streamer=notes)
        assert notes.ends == 1
        told.append([value.tolist() for value in notes.got])
    assert told[0] == told[1]


def test_a_text_streamer_prints_the_same(
    expected: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for call in (fast().model.generate, fast()):
        call(**ASKED, streamer=TextStreamer(TOKENIZER))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_an_iterator_gives_the_same_text(expected: torch.Tensor) -> None:
    texts = []
    for call in (fast().model.generate, fast()):
        streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=call, kwargs={**ASKED, "streamer": streamer})
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1] == TOKENIZER.decode(expected[0, 12:])


def test_an_asynchronous_iterator_gives_the_same_text(expected: torch.Tensor) -> None:
    async def text() -> str:
        streamer = AsyncTextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=60)
        decoding = asyncio.get_running_loop().run_in_executor(
            None, functools.partial(fast(), **ASKED, streamer=streamer)
        )
        read = "".join([piece async for piece in streamer])
        await decoding
        return read

    assert asyncio.run(text()) == TOKENIZER.decode(expected[0, 12:])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_streamer_that_raises_stops_decoding_and_frees_the_caches(
    rows: int, caches: list[weakref.ref[TreeCache]]
) -> None:
    notes, before = Notes(fails=3), Foretold.open
    batch = torch.tensor([random_ids(12, seed=row) for row in range(rows)])
    with pytest.raises(ConnectionError, match="nobody listens") as raised:
        fast()(**{**ASKED, "inputs": batch}, streamer=notes)
    assert (len(notes.got), notes.ends) == (2, 0)
    assert Foretold.open == before
    del raised
    assert len(caches) == rows
    assert all(cache() is None for cache in caches)


def test_an_error_in_decoding_ends_no_streamer_as_in_generate() -> None:
    def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("midway")

    speedup = fast()
    for call in (speedup.model.generate, speedup):
        notes = Notes()
        with pytest.raises(RuntimeError, match="midway"):
            call(**ASKED, streamer=notes, logits_processor=[fails])
        assert (len(notes.got), notes.ends) == (1, 0)


def _held_back(streamer: Any, gate: threading.Semaphore) -> Any:
    """The streamer's ``put`` waits for the reader before each piece."""
    put = streamer.put

    def wait(value: torch.Tensor) -> None:
        assert gate.acquire(timeout=60)
        put(value)

    streamer.put = wait
    return streamer


def test_a_reader_that_stops_early_ends_generation_and_frees_the_cache(
    caches: list[weakref.ref[TreeCache]],
) -> None:
    gate = threading.Semaphore(6)
    streamer = _held_back(
        ClosableStreamer(TOKENIZER, skip_prompt=True, timeout=60), gate
    )
    outputs: list[torch.Tensor] = []
    thread = threading.Thread(
        target=lambda: outputs.append(fast()(**ASKED, streamer=streamer))
    )
    thread.start()
    for _ in streamer:
        break
    gate.release(100)
    thread.join(60)
    [output] = outputs
    assert 12 < output.shape[1] < 42
    assert fast().decoder.last[0].finish == "unfinished"
    assert caches
    assert all(cache() is None for cache in caches)


def test_a_reader_that_reads_to_the_end_gets_everything(expected: torch.Tensor) -> None:
    streamer = ClosableStreamer(TOKENIZER, skip_prompt=True, timeout=60)
    assert torch.equal(fast()(**ASKED, streamer=streamer), expected)
    assert "".join(streamer) == TOKENIZER.decode(expected[0, 12:])


def test_an_asynchronous_reader_may_stop_early(
    caches: list[weakref.ref[TreeCache]],
) -> None:
    async def read() -> torch.Tensor:
        gate = threading.Semaphore(6)
        streamer = _held_back(
            AsyncClosableStreamer(TOKENIZER, skip_prompt=True, timeout=60), gate
        )
        decoding = asyncio.get_running_loop().run_in_executor(
            None, functools.partial(fast(), **ASKED, streamer=streamer)
        )
        pieces = aiter(streamer)
        assert await anext(pieces)
        await pieces.aclose()
        gate.release(100)
        output: torch.Tensor = await decoding
        return output

    assert 12 < asyncio.run(read()).shape[1] < 42
    assert all(cache() is None for cache in caches)


@pytest.mark.parametrize("first", ["read", "left", "left at its end", "closed"])
def test_a_streamer_serves_one_generation_after_another(
    first: str, expected: torch.Tensor
) -> None:
    streamer = ClosableStreamer(TOKENIZER, skip_prompt=True, timeout=60)
    gate = threading.Semaphore(6 if first == "left" else 1000)
    thread = threading.Thread(
        target=fast(), kwargs={**ASKED, "streamer": _held_back(streamer, gate)}
    )
    thread.start()
    if first.startswith("left"):
        if first != "left":
            thread.join(60)
        for _ in streamer:
            break
        gate.release(1000)
    elif first == "read":
        assert "".join(streamer)
    thread.join(60)
    if first != "left":
        streamer.close()
    for _ in range(2):
        thread = threading.Thread(target=fast(), kwargs={**ASKED, "streamer": streamer})
        thread.start()
        assert "".join(streamer) == TOKENIZER.decode(expected[0, 12:])
        thread.join(60)


def test_an_asynchronous_streamer_serves_one_generation_after_another(
    expected: torch.Tensor,
) -> None:
    async def texts() -> list[str]:
        streamer = AsyncClosableStreamer(TOKENIZER, skip_prompt=True, timeout=60)
        read = []
        for early in (True, False, False):
            decoding = asyncio.get_running_loop().run_in_executor(
                None, functools.partial(fast(), **ASKED, streamer=streamer)
            )
            pieces: Any = aiter(streamer)  # an asynchronous generator
            if early:
                await anext(pieces)
                await pieces.aclose()
            else:
                read.append("".join([piece async for piece in pieces]))
            await decoding
        return read

    assert asyncio.run(texts()) == [TOKENIZER.decode(expected[0, 12:])] * 2


def test_a_loop_is_told_of_the_end_where_someone_else_closes() -> None:
    gate = threading.Semaphore(6)
    streamer = _held_back(
        ClosableStreamer(TOKENIZER, skip_prompt=True, timeout=60), gate
    )
    thread = threading.Thread(target=fast(), kwargs={**ASKED, "streamer": streamer})
    thread.start()
    pieces = iter(streamer)
    assert next(pieces)
    streamer.close()
    gate.release(1000)
    assert sum(1 for _ in pieces) < 30
    thread.join(60)


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    before = Foretold.open
    yield
    assert Foretold.open == before


@pytest.mark.parametrize("prompted", [True, False])
def test_a_reader_gone_before_anything_came_ends_generation_without_an_error(
    prompted: bool,
) -> None:
    streamer = ClosableStreamer(TOKENIZER, skip_prompt=prompted, timeout=60)
    streamer.close()
    output = fast()(**ASKED, streamer=streamer)
    assert 12 <= output.shape[1] < 42
    assert fast().decoder.last[0].finish == "unfinished"
