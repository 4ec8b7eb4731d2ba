"""Models that keep a sequence's state in their modules, against ``generate``."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from adaptspec.decoder import Decoder, load
from adaptspec.errors import SequenceStateError
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.module_state import ModuleState
from adaptspec.testing.fakes import VOCAB, hf_greedy, random_ids
from adaptspec_profiles.memory import MemoryStore

PLAIN = "autoregressive"
PROMPTS = [random_ids(20), random_ids(13, seed=5), [7]]


@pytest.fixture(scope="module")
def module() -> Any:
    config = transformers.RecurrentGemmaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        lru_width=32,
        attention_window_size=16,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        w_init_variance_scale=2.0,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]


@pytest.fixture
def decoder(module: Any) -> Decoder:
    return load(module, db=MemoryStore())


@pytest.fixture(scope="module")
def expected(module: Any) -> list[list[int]]:
    """What ``generate`` of a model that decoded nothing before emits."""
    fresh = [LanguageModel(copy.deepcopy(module), accelerate=False) for _ in PROMPTS]
    return [hf_greedy(one, p, 12) for one, p in zip(fresh, PROMPTS, strict=True)]


def steps(
    decoder: Decoder, prompt: Sequence[int], count: int = 12
) -> Iterator[list[int]]:
    stream = decoder.stream(
        prompt, strategy=PLAIN, max_new_tokens=count, temperature=0.0
    )
    yield from stream._steps


def whole(decoder: Decoder, prompt: Sequence[int]) -> list[int]:
    return [token for tokens in steps(decoder, prompt) for token in tokens]


def test_streams_read_in_turns_dont_take_each_others_state(
    decoder: Decoder, expected: list[list[int]]
) -> None:
    turns = zip_longest(*[steps(decoder, prompt) for prompt in PROMPTS], fillvalue=[])
    found: list[list[int]] = [[] for _ in PROMPTS]
    for turn in turns:
        for tokens, new in zip(found, turn, strict=True):
            tokens.extend(new)
    assert found == expected


def test_a_stream_given_up_leaves_nothing_behind(
    decoder: Decoder, expected: list[list[int]]
) -> None:
    given_up = steps(decoder, PROMPTS[0])
    for _ in range(3):
        next(given_up)
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert whole(decoder, prompt) == tokens


def test_threads_dont_take_each_others_state(
    decoder: Decoder, expected: list[list[int]]
) -> None:
    found: dict[int, list[list[int]]] = {}

    def decode(index: int) -> None:
        found[index] = [whole(decoder, PROMPTS[index]) for _ in range(3)]

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [expected[index]] * 3 for index in range(2)}


def test_the_callers_module_keeps_its_own_state(module: Any, decoder: Decoder) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        module(ids, use_cache=True)
        before = module.model.layers[0].temporal_block.conv1d_state
        whole(decoder, PROMPTS[1])
    assert module.model.layers[0].temporal_block.conv1d_state is before


class Counter(nn.Module):
    """Adds up what it reads, in an attribute that is assigned or written to."""

    total: torch.Tensor

    def __init__(self, size: int, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("total", torch.zeros(size))

    def forward(self, x: float) -> float:
        if self.in_place:
            self.total += x
        else:
            self.total = self.total + x
        return float(self.total[0])


class Cache:
    """What stands for a sequence."""


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("size", [4, 1 << 20])
def test_state_of_any_size_is_exchanged_or_refused(size: int, in_place: bool) -> None:
    counter = Counter(size, in_place)
    state = ModuleState(counter, "counter")
    first, second = Cache(), Cache()

    def step(cache: Any, x: float) -> float:
        with state.of(cache):
            return float(counter(x))

    assert step(first, 1) == 1
    if size > 4 and in_place:  # nobody has kept its first value
        with pytest.raises(SequenceStateError, match="total of Counter") as refused:
            step(second, 10)
        assert "\n" not in str(refused.value)
        assert step(first, 2) == 3
        return
    assert step(second, 10) == 10
    assert step(first, 2) == 3
    assert step(None, 100) == 100  # belongs to no sequence
    assert step(second, 20) == 30
    del first
    assert step(Cache(), 5) == 5


class Lazy(nn.Module):
    """Sets itself up at the first pass, from what only that one finds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: float | None = None
        self.given: float | None = 2.0
        self.steps: torch.Tensor | None = None

    def forward(self) -> float:
        if self.scale is None:
            self.scale, self.given = self.given, None
        self.steps = torch.ones(1) if self.steps is None else self.steps + 1
        assert self.scale is not None
        return self.scale * float(self.steps)


def test_what_is_set_up_once_is_no_sequences_state() -> None:
    lazy = Lazy()
    state = ModuleState(lazy, "lazy")
    state.learn(lazy() for _ in range(3))
    caches = [Cache(), Cache()]
    found = []
    for cache in caches * 2:
        with state.of(cache):
            found.append(lazy())
    assert found == [2, 2, 4, 4]


def test_a_module_without_state_doesnt_make_threads_wait() -> None:
    layer = nn.Linear(2, 2)
    state = ModuleState(layer, "linear")
    with state.of(Cache()):
        layer(torch.zeros(2))
    entered = threading.Event()

    def enter() -> None:
        with state.of(Cache()):
            entered.set()

    with state.of(Cache()):
        thread = threading.Thread(target=enter)
        thread.start()
        assert entered.wait(10)
        thread.join()
