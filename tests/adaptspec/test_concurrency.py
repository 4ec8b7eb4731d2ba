"""One decoder in several threads, interleaved streams and forked processes."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

import adaptspec
from adaptspec.decoder import Decoder
from adaptspec.errors import ForkedProcessError, ForkedProcessWarning
from adaptspec.knowledge import KnowledgeFile
from adaptspec.model.forked import heed_fork
from adaptspec.model.language_model import LanguageModel
from adaptspec.streaming.stream import Stream
from adaptspec.testing.fakes import (
    hf_greedy,
    noisy_draft,
    random_ids,
    tiny_model,
    tiny_module,
    tiny_tokenizer,
)
from adaptspec.testing.heads import attach_tiny_heads
from adaptspec.turns import forks
from adaptspec_profiles.memory import MemoryStore

LONG = 60.0  # seconds after which a test has hung
STRATEGIES = (
    "autoregressive",
    "prompt_lookup",
    "suffix",
    "token_recycling",
    "lookahead",
    "draft_model",
    "draft_tree",
    "medusa",
    "hybrid",
)
PROMPTS = [random_ids(6 + i, seed=i) * 2 for i in range(4)]
TOKENS = 16


@pytest.fixture
def eager() -> Iterator[None]:
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes with one thread, as tiny models deserve."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decoder_of_all(**more: Any) -> Decoder:
    """A decoder on which all strategies can run."""
    model = tiny_model("llama", tokenizer=tiny_tokenizer())
    draft = noisy_draft(model)
    attach_tiny_heads(model)
    return Decoder(model, draft, MemoryStore(), **more)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of_all()


@pytest.fixture(scope="module")
def greedy(decoder: Decoder) -> list[list[int]]:
    return [hf_greedy(decoder.model, prompt, TOKENS) for prompt in PROMPTS]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_draft_model_that_was_loaded_first_makes_nobody_wait_for_ever() -> None:
    """Turns are taken in the order in which models were made, streams' steps, too."""
    draft = noisy_draft(tiny_model("llama"))
    decoder = Decoder(tiny_model("llama"), draft, MemoryStore())
    asked: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0}

    def reads() -> None:
        for _ in range(8):
            list(decoder.stream(PROMPTS[0], strategy="draft_model", **asked))

    def generates() -> None:
        for _ in range(8):
            decoder.generate(PROMPTS[1], strategy="draft_model", **asked)

    in_threads([reads, generates, reads, generates])


def in_threads(works: list[Callable[[], Any]]) -> None:
    """Run them all at once; raise what any raised."""
    errors: list[BaseException] = []

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(w,), daemon=True) for w in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.slow
@pytest.mark.usefixtures("eager", "one_thread")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_threads_that_share_a_decoder_get_what_each_gets_alone(
    strategy: str, decoder: Decoder, greedy: list[list[int]]
) -> None:
    # Coupled drafts emit plain sampling's tokens; others draw noise of their own.
    coupled = {"draft_model": {"draft_sampling": "coupled"}}.get(strategy)
    chance: dict[str, Any] = {"temperature": 1.5, "do_sample": True, "seed": 5}
    alone = [
        decoder.generate(
            prompt, strategy="autoregressive", max_new_tokens=TOKENS, **chance
        ).token_ids
        for prompt in PROMPTS
    ]

    def work(number: int) -> None:
        for _ in range(3):
            asked: dict[str, Any] = {"strategy": strategy, "max_new_tokens": TOKENS}
            found = decoder.generate(PROMPTS[number], **asked, temperature=0)
            assert found.token_ids == greedy[number]
            found = decoder.generate(PROMPTS[number], **asked, **chance, params=coupled)
            assert found.token_ids == alone[number]

    in_threads([partial(work, number) for number in range(4)])


@pytest.mark.slow
@pytest.mark.usefixtures("eager", "one_thread")
def test_threads_may_use_different_strategies_and_streams_at_once(
    decoder: Decoder, greedy: list[list[int]]
) -> None:
    texts = [decoder.model.decode(ids) for ids in greedy]

    def work(number: int) -> None:
        for strategy in STRATEGIES[number::2]:
            asked: dict[str, Any] = {"strategy": strategy, "temperature": 0}
            stream = decoder.stream(PROMPTS[number], max_new_tokens=TOKENS, **asked)
            if number == 3:
                with stream:  # given up
                    next(stream)
                continue
            assert "".join(stream) == texts[number]
            assert stream.result.token_ids == greedy[number]

    in_threads([partial(work, number) for number in range(4)])


@pytest.mark.slow
@pytest.mark.usefixtures("eager", "one_thread")
def test_two_decoders_over_one_model_may_run_in_threads() -> None:
    module = tiny_module("llama")
    decoders = [adaptspec.load(module, db=MemoryStore()) for _ in range(2)]
    shared = [Decoder(decoders[0].model, None, MemoryStore()) for _ in range(2)]
    expected = [hf_greedy(decoders[0].model, prompt, TOKENS) for prompt in PROMPTS]

    def work(one: Decoder, number: int) -> None:
        for strategy in ("hybrid", "suffix", "autoregressive"):
            asked: dict[str, Any] = {"strategy": strategy, "temperature": 0}
            found = one.generate(PROMPTS[number], max_new_tokens=TOKENS, **asked)
            assert found.token_ids == expected[number]

    each = zip([*decoders, *shared], range(4), strict=True)
    in_threads([partial(work, one, number) for one, number in each])


def interleaved(streams: list[Stream], order: list[int]) -> None:
    """Ask one after the other for a piece, in an order that repeats."""
    open_ones = set(range(len(streams)))
    for number in itertools.cycle(order):
        if next(streams[number], None) is None:
            open_ones.discard(number)
        if not open_ones:
            return


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("guard", [True, False])
def test_streams_read_in_turns_give_what_each_gives_alone(
    strategy: str, guard: bool, decoder: Decoder, greedy: list[list[int]]
) -> None:
    decoder.engine.guard = guard
    asked: dict[str, Any] = {"strategy": strategy, "temperature": 0}
    asked["max_new_tokens"] = TOKENS
    for order in ([0, 1, 2, 3], [0, 0, 0, 1, 2, 3, 3]):
        streams = [decoder.stream(prompt, **asked) for prompt in PROMPTS]
        interleaved(streams, order)
        assert [stream.result.token_ids for stream in streams] == greedy


def test_several_threads_may_read_one_stream(
    decoder: Decoder, greedy: list[list[int]]
) -> None:
    asked: dict[str, Any] = {"strategy": "suffix", "temperature": 0}
    stream = decoder.stream(PROMPTS[0], max_new_tokens=TOKENS, **asked)
    pieces: list[str] = []
    in_threads([lambda: pieces.extend(stream)] * 3)
    assert sorted("".join(pieces)) == sorted(decoder.model.decode(greedy[0]))
    assert stream.result.token_ids == greedy[0]


def test_a_stream_may_be_closed_by_another_thread_in_the_middle_of_a_step(
    decoder: Decoder,
) -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == len(PROMPTS[0]) + 2:
            inside.set()
            assert leave.wait(LONG)
        return scores

    asked: dict[str, Any] = {"strategy": "suffix", "logits_processor": [slow]}
    stream = decoder.stream(PROMPTS[0], max_new_tokens=TOKENS, **asked)
    read: list[str] = []

    def close() -> None:
        assert inside.wait(LONG)
        threading.Timer(0.05, leave.set).start()
        stream.close()

    in_threads([lambda: read.extend(stream), close])
    assert stream.result.finish == "unfinished"
    assert len(stream.result.token_ids) < TOKENS
    assert "".join(read) == stream.result.text


@pytest.mark.slow
def test_a_stream_dropped_in_a_cycle_is_given_up_after_the_step_that_runs(
    decoder: Decoder,
) -> None:
    """Garbage may be collected in the middle of another stream's step."""
    ended: list[str] = []
    asked: dict[str, Any] = {"strategy": "suffix", "temperature": 0}
    dropped = decoder.stream(PROMPTS[0], max_new_tokens=TOKENS, **asked)
    next(dropped)
    dropped._on_end = [lambda generation: ended.append("dropped")]
    strategy = decoder._strategies["suffix", "[]"]
    outputs = len(strategy.past)  # type: ignore[attr-defined]
    cycle: list[Any] = [dropped]
    cycle.append(cycle)
    seen: list[tuple[int, int]] = []

    def collecting(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        gc.collect()
        seen.append((len(ended), len(strategy.past)))  # type: ignore[attr-defined]
        return scores

    running = decoder.stream(
        PROMPTS[1], max_new_tokens=2, logits_processor=[collecting], **asked
    )
    del dropped, cycle
    next(running)
    assert seen == [(0, outputs)]
    assert ended == ["dropped"]
    running.finish()


@pytest.mark.slow
def test_knowledge_is_exchanged_while_other_threads_decode(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, greedy: list[list[int]]
) -> None:
    monkeypatch.setattr(MemoryStore, "folder", tmp_path)
    decoder = decoder_of_all(learn=True)
    asked: dict[str, Any] = {"temperature": 0, "max_new_tokens": TOKENS}
    done = threading.Event()
    alone, turns = list[bool](), decoder.model.turns
    merge = KnowledgeFile._merged

    def merged(self: KnowledgeFile, *given: Any) -> dict[str, Any]:
        alone.append(turns.is_mine())
        return merge(self, *given)

    monkeypatch.setattr(KnowledgeFile, "_merged", merged)

    def save() -> None:
        while not done.is_set():
            decoder.save()

    def work(number: int) -> None:
        try:
            for strategy in ("suffix", "token_recycling", "hybrid"):
                found = decoder.generate(PROMPTS[number], strategy=strategy, **asked)
                assert found.token_ids == greedy[number]
        finally:
            done.set()

    in_threads([save, partial(work, 0), partial(work, 1)])
    decoder.save()
    assert alone
    assert all(alone)
    names = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert names >= {"suffix.safetensors", "hybrid.safetensors"}


def test_a_thread_that_ends_without_reading_on_frees_its_stream(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[weakref.ref[Any]] = []
    build = LanguageModel.new_cache

    def new_cache(self: LanguageModel, capacity: int = 0) -> Any:
        cache = build(self, capacity)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(LanguageModel, "new_cache", new_cache)

    def read(strategy: str) -> None:
        stream = decoder.stream(PROMPTS[0], strategy=strategy, max_new_tokens=TOKENS)
        next(stream)
        next(stream)

    def work(strategy: str) -> None:
        read(strategy)

    gc.disable()
    try:
        in_threads([partial(work, s) for s in ("draft_model", "suffix", "hybrid")])
        assert len(caches) >= 4  # the draft models' too
        assert [each() for each in caches if each() is not None] == []
    finally:
        gc.enable()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def forked(work: Callable[[], object]) -> int:
    """The status of a forked process that runs ``work``; it is ended if it hangs."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the forked process hangs")


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["autoregressive", "hybrid", "draft_model"])
def test_a_forked_process_decodes_with_one_thread_and_says_so(strategy: str) -> None:
    """Wide enough for torch's and our own products to use all threads in the parent."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    module = tiny_module("llama", hidden_size=256, intermediate_size=1024)
    model = LanguageModel(module)
    decoder = Decoder(model, noisy_draft(model), MemoryStore())
    prompt = random_ids(150)
    asked: dict[str, Any] = {"strategy": strategy, "temperature": 0}
    asked["max_new_tokens"] = TOKENS
    try:
        expected = decoder.generate(prompt, **asked).token_ids
        assert expected == hf_greedy(model, prompt, TOKENS)
        stream = decoder.stream(prompt, **asked)
        next(stream, None)  # no tokenizer: to the end

        def work() -> None:
            with pytest.warns(ForkedProcessWarning, match="spawn"):
                assert decoder.generate(prompt, **asked).token_ids == expected
            assert torch.get_num_threads() == 1
            warnings.simplefilter("error")
            assert decoder.generate(prompt, **asked).token_ids == expected

        assert forked(work) == 0
        assert torch.get_num_threads() == max(2, before)
        assert decoder.generate(prompt, **asked).token_ids == expected
    finally:
        torch.set_num_threads(before)


@needs_fork
@pytest.mark.slow
def test_a_process_may_fork_while_other_threads_decode(
    decoder: Decoder, greedy: list[list[int]]
) -> None:
    asked: dict[str, Any] = {"strategy": "suffix", "temperature": 0}
    asked["max_new_tokens"] = TOKENS
    done = threading.Event()

    def decode() -> None:
        while not done.is_set():
            assert decoder.generate(PROMPTS[1], **asked).token_ids == greedy[1]

    def work() -> None:
        warnings.simplefilter("ignore")
        assert decoder.generate(PROMPTS[0], **asked).token_ids == greedy[0]

    def fork() -> None:
        try:
            for _ in range(5):
                assert forked(work) == 0
        finally:
            done.set()

    in_threads([decode, decode, fork])


def test_a_gpu_is_refused_by_name_in_a_forked_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heed_fork(torch.device("cuda"))
    monkeypatch.setattr(forks, "is_child", True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(ForkedProcessError, match="spawn or forkserver"):
        heed_fork(torch.device("cuda"))
