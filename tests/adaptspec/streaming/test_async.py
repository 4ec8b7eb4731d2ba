"""A stream read by ``async for`` leaves the event loop alone, and frees everything."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

import adaptspec
from adaptspec.decoder import Decoder
from adaptspec.errors import InvalidPromptError
from adaptspec.model.cache import TreeCache
from adaptspec.profile import PLAIN
from adaptspec.strategy import Context, Drafter, Strategy, Target, TokenTree
from adaptspec.testing.fakes import random_ids, tiny_module, tiny_tokenizer
from adaptspec_profiles.memory import MemoryStore

PROMPT = random_ids(12)
ASKED: dict[str, Any] = {"strategy": "prompt_lookup", "max_new_tokens": 20}
LONG = 30.0  # seconds after which a test has hung


class Gated(Strategy):
    """Each step waits for leave; what it keeps of a sequence can be watched.

    Args:
        fails_at: The step that raises.
    """

    name = "gated"
    summary = "waits"

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__()
        self.leave = threading.Semaphore(0)
        self.waits = threading.Event()
        self.fails_at, self.steps = fails_at, 0
        self.threads: set[int] = set()
        self.drafters: list[weakref.ref[Drafter]] = []
        self.closed = threading.Semaphore(0)

    def start(self, target: Target) -> Drafter:
        drafter = _Gated(self)
        self.drafters.append(weakref.ref(drafter))
        return drafter


class _Gated(Drafter):
    def __init__(self, strategy: Gated) -> None:
        self._strategy = strategy

    def propose(self, context: Context) -> TokenTree:
        strategy = self._strategy
        strategy.steps += 1
        strategy.threads.add(threading.get_ident())
        strategy.waits.set()
        assert strategy.leave.acquire(timeout=LONG)
        if strategy.steps == strategy.fails_at:
            raise RuntimeError("no more ideas")
        return TokenTree.root_only(context.ids[-1])

    def close(self) -> None:
        self._strategy.closed.release()


@pytest.fixture
def decoder() -> Decoder:
    module = tiny_module("llama")
    made = adaptspec.load(module, db=MemoryStore(), tokenizer=tiny_tokenizer())
    made.engine.guard = False
    return made


@pytest.fixture
def gated(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gated]:
    strategy = Gated()
    monkeypatch.setattr(decoder, "_strategy", lambda choice: strategy)
    yield strategy
    for _ in range(100):
        strategy.leave.release()


@pytest.fixture
def caches(
    caches: list[weakref.ref[TreeCache]],
) -> Iterator[list[weakref.ref[TreeCache]]]:
    """Every cache made from now on, while nothing but its last owner frees one."""
    gc.collect()
    gc.disable()
    yield caches
    gc.enable()


def freed(caches: list[weakref.ref[TreeCache]], gated: Gated) -> bool:
    owned: list[weakref.ref[Any]] = [*caches, *gated.drafters]
    return all(each() is None for each in owned)


def test_the_pieces_are_those_that_for_gives(decoder: Decoder) -> None:
    expected = list(decoder.stream(PROMPT, **ASKED))

    async def main() -> None:
        stream = decoder.stream(PROMPT, **ASKED)
        assert [piece async for piece in stream] == expected
        assert stream.result.finish == "length"
        other = await decoder.astream(PROMPT, **ASKED)
        read = [await anext(other), await anext(other)]
        other.finish()
        assert "".join([*read, *[p async for p in other]]) == "".join(expected)

    asyncio.run(main())


def test_two_streams_share_the_loop(decoder: Decoder) -> None:
    prompts = [random_ids(9, seed=seed) for seed in range(3)]
    alone = [decoder.generate(prompt, **ASKED).token_ids for prompt in prompts]

    async def read(prompt: list[int]) -> list[int]:
        async with await decoder.astream(prompt, **ASKED) as stream:
            async for _ in stream:
                pass
        return stream.result.token_ids

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(read(prompt) for prompt in prompts))

    assert asyncio.run(main()) == alone


def test_the_event_loop_goes_on_while_a_step_runs(
    decoder: Decoder, gated: Gated
) -> None:
    async def main() -> None:
        stream = decoder.stream(PROMPT, strategy=PLAIN, max_new_tokens=3)
        await anext(stream)  # of the prompt
        coming = asyncio.ensure_future(anext(stream))
        while not gated.waits.is_set():
            await asyncio.sleep(0)  # the loop goes on, or this never ends
        assert not coming.done()
        gated.leave.release()
        assert await coming
        assert threading.get_ident() not in gated.threads
        await stream.aclose()

    asyncio.run(main())


def test_a_cancelled_reader_gives_up_at_once_and_frees_all_after_the_step(
    decoder: Decoder, gated: Gated, caches: list[weakref.ref[TreeCache]]
) -> None:
    async def main() -> None:
        stream = decoder.stream(PROMPT, strategy=PLAIN, max_new_tokens=9)
        await anext(stream)
        reader = asyncio.ensure_future(anext(stream))
        while not gated.waits.is_set():
            await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert not freed(caches, gated)  # the step still runs
        gated.leave.release()
        assert gated.closed.acquire(timeout=LONG)
        await stream.aclose()
        assert gated.steps == 1
        assert stream.result.finish == "unfinished"
        assert len(stream.result.token_ids) == 2
        assert "".join([p async for p in stream]) in stream.result.text
        assert freed(caches, gated)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["break", "error", "block", "aclose", "task"])
def test_a_reader_that_stops_early_frees_everything(
    how: str,
    decoder: Decoder,
    gated: Gated,
    caches: list[weakref.ref[TreeCache]],
) -> None:
    for _ in range(100):
        gated.leave.release()

    async def read() -> None:
        stream = decoder.stream(PROMPT, strategy=PLAIN, max_new_tokens=20)
        if how == "block":
            async with stream:
                await anext(stream)
                assert not freed(caches, gated)
            assert freed(caches, gated)
            return
        async for _ in stream:
            assert not freed(caches, gated)
            if how == "error":
                raise ZeroDivisionError
            if how == "aclose":
                await stream.aclose()
                assert freed(caches, gated)
            elif how == "task":
                await asyncio.Event().wait()
            else:
                break

    async def main() -> None:
        if how == "error":
            with pytest.raises(ZeroDivisionError):
                await read()
            return
        task = asyncio.ensure_future(read())
        if how == "task":
            while gated.steps < 1 and not caches:
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await task

    asyncio.run(main())
    assert freed(caches, gated)
    assert gated.closed.acquire(timeout=LONG)
    assert not gated.closed.acquire(blocking=False)


@pytest.mark.slow
def test_an_error_arrives_once(
    decoder: Decoder, gated: Gated, caches: list[weakref.ref[TreeCache]]
) -> None:
    gated.fails_at = 2
    for _ in range(100):
        gated.leave.release()

    async def main() -> None:
        stream = decoder.stream(PROMPT, strategy=PLAIN, max_new_tokens=9)
        read = [await anext(stream), await anext(stream)]
        with pytest.raises(RuntimeError, match="no more ideas"):
            await anext(stream)
        assert "".join([*read, *[p async for p in stream]]) == stream.result.text
        assert stream.result.finish == "unfinished"

    asyncio.run(main())
    gc.collect()  # a traceback holds on to the step that failed
    assert freed(caches, gated)


def test_a_bad_prompt_is_refused_before_anything_is_decoded(decoder: Decoder) -> None:
    async def main() -> None:
        with pytest.raises(InvalidPromptError, match="at least one token"):
            await decoder.astream([], **ASKED)

    asyncio.run(main())
