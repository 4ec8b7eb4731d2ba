"""What requests took is added up, written now and then, and decides."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adaptspec
import adaptspec_plugins
from adaptspec.choosing.learning import Learning
from adaptspec.decoder import Decoder, PlainDecodingWarning
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.decoding.stats import RunStats, StepStats
from adaptspec.environment import environment_of
from adaptspec.errors import ProfileStoreError, StoreWarning
from adaptspec.hookspecs import hookimpl
from adaptspec.host import Host
from adaptspec.in_use import Uses, describe, use_of
from adaptspec.model.language_model import LanguageModel
from adaptspec.profile import PLAIN, ProfileStore, Use
from adaptspec.strategy import Context, Strategy
from adaptspec.testing.fakes import (
    VOCAB,
    FakeClock,
    ScriptedStrategy,
    random_ids,
    tiny_module,
    tiny_tokenizer,
)
from adaptspec.testing.stores import example_profile
from adaptspec.token_tree import TokenTree
from adaptspec_plugins.autoregressive import Autoregressive
from adaptspec_profiles import open_store
from adaptspec_profiles.memory import MemoryStore
from decided import keep

PROMPT = random_ids(12)
SURE = Learning(exploration=0)  # tries nothing that isn't expected to be fastest


def stats(*steps: tuple[int, int, int, float]) -> RunStats:
    """Of steps that proposed, accepted and emitted so many, in so many seconds."""
    made = [StepStats(p, a, e, s, 0.0, 0.0) for p, a, e, s in steps]
    return RunStats(5, 1 + sum(step.emitted for step in made), 0.25, made)


def use(requests: int, tokens: int, forwards: int, profile: int = 1) -> Use:
    """With 2.5 candidates a forward, as in the example's profile."""
    proposed = 5 * forwards // 2
    return Use(
        *(profile, "chat", requests, tokens, forwards, proposed, 3),
        *(1.0, 2.0, 0.5, 0.7),
    )


def test_a_request_is_its_sums() -> None:
    found = use_of(7, "chat", stats((4, 2, 3, 0.5), (2, 0, 1, 0.1)))
    assert found is not None
    assert (found.profile, found.prompt_class, found.requests) == (7, "chat", 1)
    assert (found.tokens, found.forwards) == (4, 2)
    assert (found.proposed, found.accepted) == (6, 2)
    assert found.seconds_prefill == 0.25
    assert found.seconds == pytest.approx(0.6)
    assert found.ratio is None
    assert found.tokens_per_forward == 2.0
    assert found.tokens_per_second == pytest.approx(4 / 0.6)
    assert found.acceptance == pytest.approx(1 / 3)
    assert use_of(7, "chat", stats()) is None


_counts = st.integers(0, 9)
_uses = st.builds(
    Use, st.just(1), st.just("x"), *([_counts] * 5), *([st.just(0.5)] * 4)
)


@pytest.mark.slow
@given(_uses, _uses, _uses)
def test_sums_are_the_same_in_any_order(one: Use, two: Use, three: Use) -> None:
    assert one + two == two + one
    assert (one + two) + three == one + (two + three)
    assert (one + two).tokens == one.tokens + two.tokens


class Counting:
    """Opens a store; counts, and fails where it is told to."""

    def __init__(self, store: ProfileStore, error: Exception | None = None) -> None:
        self.store, self.error, self.opened = store, error, 0

    def __call__(self) -> AbstractContextManager[ProfileStore]:
        self.opened += 1
        if self.error is not None:
            raise self.error
        return nullcontext(self.store)


def test_it_is_written_once_a_while_and_at_the_end() -> None:
    store, clock = MemoryStore(), FakeClock()
    (number,) = store.add_profiles([example_profile()])
    opens = Counting(store)
    uses = Uses(opens, every=60.0, clock=clock)
    for _ in range(5):
        uses.add(use(1, 10, 5, number))
    assert opens.opened == 0
    clock.advance(60.0)
    uses.add(use(1, 10, 5, number))
    uses.close()  # waits for the writing that has begun
    assert opens.opened == 1
    uses.add(use(1, 10, 5, number))
    assert [u.requests for u in store.uses()] == [6]
    uses.close()
    uses.close()
    assert opens.opened == 2
    assert [u.requests for u in store.uses()] == [7]
    assert uses.totals() == store.uses()


@pytest.mark.parametrize("error", [ProfileStoreError("read-only"), RuntimeError("x")])
def test_a_store_that_cannot_be_written_ends_the_recording_only(
    error: Exception,
) -> None:
    clock = FakeClock()
    opens = Counting(MemoryStore(), error)
    uses = Uses(opens, every=1.0, clock=clock)
    for _ in range(9):
        clock.advance(2.0)
        uses.add(use(1, 10, 5))
        uses.close()
    assert opens.opened == 1
    assert uses.problem is not None
    assert str(error) in uses.problem
    assert uses.totals()[0].requests == 9


def test_threads_add_without_losing_any() -> None:
    store = MemoryStore()
    (number,) = store.add_profiles([example_profile()])
    uses = Uses(Counting(store))

    def add() -> None:
        for _ in range(200):
            uses.add(use(1, 10, 5, number))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    uses.close()
    assert [u.requests for u in store.uses()] == [800]


def test_what_a_parent_added_is_not_written_by_its_fork(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore()
    (number,) = store.add_profiles([example_profile()])
    uses = Uses(Counting(store))
    uses.add(use(3, 10, 5, number))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    uses.add(use(1, 10, 5, number))
    uses.close()
    assert [u.requests for u in store.uses()] == [1]


def test_a_writer_that_cannot_be_started_fails_no_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, clock = MemoryStore(), FakeClock()
    (number,) = store.add_profiles([example_profile()])
    uses = Uses(Counting(store), every=1.0, clock=clock)

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    clock.advance(2.0)
    uses.add(use(1, 10, 5, number))
    uses.close()
    assert [u.requests for u in store.uses()] == [1]


def in_time(work: Callable[[], object]) -> bool:
    """Whether ``work`` ends at all."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=30.0)
    return not thread.is_alive()


def test_a_stream_that_is_dropped_while_another_is_added_waits_for_nothing() -> None:
    dropped: list[Use] = []

    def clock() -> float:
        """Asked for within ``add``: there the garbage collector may run, too."""
        while dropped:
            uses.add(dropped.pop())
        return 0.0

    uses = Uses(Counting(MemoryStore()), clock=clock)
    dropped.append(use(1, 10, 5))
    assert in_time(lambda: uses.add(use(1, 10, 5)))
    assert [u.requests for u in uses.totals()] == [2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_adds_can_add() -> None:
    held, over = threading.Event(), threading.Event()

    def clock() -> float:
        if threading.current_thread() is other:
            held.set()
            over.wait(30.0)
        return 0.0

    other = threading.Thread(target=lambda: uses.add(use(1, 10, 5)))
    uses = Uses(Counting(MemoryStore()), clock=clock)
    other.start()
    held.wait(30.0)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # ends a child that hangs
        uses.add(use(1, 10, 5))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    over.set()
    other.join()
    assert status == 0


ANSWER_LENGTH = 48


class Drafting:
    """A plugin of two strategies: one drafts the answer, the other what it isn't."""

    def __init__(self, model: LanguageModel) -> None:
        plain = Host({"bundled": adaptspec_plugins}).create(PLAIN, {})
        controls = Controls.greedy(ANSWER_LENGTH)
        answer = Engine(model).generate(plain, PROMPT, controls).token_ids

        def chain(context: Context, shift: int) -> TokenTree:
            done = len(context.ids) - len(PROMPT)
            ahead = answer[done : done + min(3, context.room - 1, context.max_nodes)]
            tokens = [(token + shift) % VOCAB for token in ahead]
            return TokenTree.chain(context.ids[-1], tokens)

        class Useful(ScriptedStrategy):
            name = "useful"
            summary = "drafts the answer"

            def __init__(self, params: Any = None) -> None:
                super().__init__(lambda context: chain(context, 0))

        class Useless(ScriptedStrategy):
            name = "useless"
            summary = "drafts what the answer isn't"

            def __init__(self, params: Any = None) -> None:
                super().__init__(lambda context: chain(context, 1))

        self._strategies = [Useful, Useless]

    @hookimpl
    def register_strategies(self) -> list[type[Strategy]]:
        """Both, and plain decoding."""
        return [Autoregressive, *self._strategies]


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(tiny_module("llama"), tiny_tokenizer())


def tuned(model: LanguageModel, store: ProfileStore) -> list[int]:
    """Two settings that beat plain decoding for chat, the first by more."""
    here = environment_of(model, None)
    first = example_profile(
        environment=here, strategy="prompt_lookup", params={"draft_length": 3}
    )
    second = replace(first, strategy="suffix", params={})
    slower = replace(first.measurement, ratio=1.3)
    both = [first, replace(second, measurement=slower)]
    plain = replace(first, strategy=PLAIN, params={})
    store.add_profiles([plain])
    keep(store, both)
    return store.add_profiles(both)


def test_requests_are_added_up_by_profile_and_class(
    model: LanguageModel, tmp_path: Path
) -> None:
    path = tmp_path / "p.db"
    store = open_store(str(path))
    number, _ = tuned(model, store)
    store.close()
    decoder = adaptspec.load(model, db=path, adapt=SURE)
    for _ in range(3):
        last = decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=9)
    decoder.generate(PROMPT, strategy="prompt_lookup", max_new_tokens=9)
    decoder.save()
    store = open_store(str(path))
    (found,) = store.uses()
    assert (found.profile, found.prompt_class, found.requests) == (number, "chat", 3)
    assert found.tokens == 3 * 8  # the first token is the prefill's
    assert found.proposed >= last.stats.proposed
    assert found.seconds > last.stats.seconds_decode
    store.close()


def test_without_record_nothing_is_kept(model: LanguageModel) -> None:
    store = MemoryStore()
    tuned(model, store)
    decoder = adaptspec.load(model, db=store, record=False)
    decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=9)
    decoder.save()
    assert store.uses() == []


def test_a_read_only_database_is_used_without_being_written(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.db"
    store: Any = open_store(str(path))
    tuned(model, store)
    decoder = Decoder(model, store=store, adapt=SURE)

    @contextmanager
    def refused(engine: Any) -> Iterator[Any]:
        raise ProfileStoreError("attempt to write a readonly database")
        yield

    monkeypatch.setattr(store, "_transaction", refused)
    result = decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=9)
    decoder.save()
    assert result.choice.strategy == "prompt_lookup"
    assert decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=9).token_ids


def test_a_tuned_setting_is_described_beside_what_use_saw() -> None:
    profile = example_profile()
    known = replace(use(9, 200, 100), log_ratio=3 * math.log(1.2), weight=3.0)
    said = describe(profile, known)
    assert said.startswith(
        "9 requests, 1.20x plain decoding lately (tuned 1.50x), 2.00 tokens per forward"
    )
    assert describe(profile, use(9, 200, 100)).startswith("9 requests, 2.00 tokens")


def worse(number: int) -> Use:
    """Thirty requests at 0.8 times plain decoding's speed, lately."""
    log = math.log(0.8)
    return replace(
        use(30, 3000, 3000, number),
        log_ratio=30 * log,
        log_ratio_squared=30 * log * log,
        weight=30.0,
    )


def test_what_is_worse_in_use_gives_way_to_the_next_and_then_to_plain_decoding(
    model: LanguageModel,
) -> None:
    alone = Learning(exploration=0, shared=0)  # each setting by itself
    store = MemoryStore()
    first, second = tuned(model, store)
    assert Decoder(model, store=store).choose("chat").strategy == "prompt_lookup"
    store.add_uses([worse(first)])
    choice = Decoder(model, store=store, adapt=alone).choose("chat")
    assert choice.strategy == "suffix"
    assert choice.reason.startswith("measured 1.30x")
    assert "faster than prompt_lookup (tuned 1.50x, in use 0.80x plain" in choice.reason
    store.add_uses([worse(second)])
    decoder = Decoder(model, store=store, adapt=alone)
    result = decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=9)
    assert result.choice.strategy == PLAIN
    assert "suffix (tuned 1.30x, in use 0.80x" in result.choice.reason
    # Measured again, it has a new chance.
    profile = store.profile(first)
    assert profile is not None
    created = profile.created.replace(year=2031)
    store.add_profiles([replace(profile, id=None, created=created)])
    assert Decoder(model, store=store).choose("chat").strategy == "prompt_lookup"


@pytest.mark.parametrize("options", [{"adapt": False}, {"record": False}])
def test_a_frozen_choice_is_what_was_tuned_whatever_use_saw(
    model: LanguageModel, options: dict[str, Any]
) -> None:
    store = MemoryStore()
    first, _ = tuned(model, store)
    store.add_uses([worse(first)])
    decoder = adaptspec.load(model, db=store, **options)
    for _ in range(3):
        result = decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=9)
        assert result.choice.strategy == "prompt_lookup"
        assert "in use" not in result.choice.reason
    decoder.save()
    (found,) = store.uses()
    assert found.requests == (33 if "adapt" in options else 30)


@pytest.mark.slow
@pytest.mark.guarded
def test_a_running_decoder_moves_to_what_decodes_faster(model: LanguageModel) -> None:
    """Time passes at looks at the clock: a step costs the same whatever it drafts."""
    store = MemoryStore()
    here = environment_of(model, None)
    slow = example_profile(environment=here, strategy="useless", params={})
    fast = replace(slow, strategy="useful")
    timed = replace(slow.measurement, objective="answer")
    slower = replace(timed, ratio=1.3, interval_low=1.2, interval_high=1.4)
    both = [replace(slow, measurement=timed), replace(fast, measurement=slower)]
    keep(store, both)
    host = Host({"test": Drafting(model)})
    decoder = adaptspec.load(model, db=store, host=host, adapt=SURE)
    decoder.engine.clock = FakeClock(tick=1.0)
    results = [
        decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=ANSWER_LENGTH)
        for _ in range(30)
    ]
    names = [result.choice.strategy for result in results]
    assert names[0] == "useless"
    assert names[-1] == "useful"
    assert names == sorted(names, reverse=True)  # changed once
    assert results[-1].stats.tokens_per_forward > 2
    assert {tuple(result.token_ids) for result in results} == {
        tuple(results[0].token_ids)
    }
    reason = results[-1].choice.reason
    assert "expected to be faster than useless (tuned 1.50x, in use " in reason
    # What was learnt is there for the next program.
    decoder.save()
    again = adaptspec.load(model, db=store, host=host, adapt=SURE)
    assert again.choose("chat").strategy == "useful"


def test_plain_decoding_is_added_up_where_it_was_measured(
    model: LanguageModel,
) -> None:
    store = MemoryStore()
    here = environment_of(model, None)
    plain = example_profile(environment=here, strategy=PLAIN, params={})
    keep(store, [plain])
    (number,) = store.add_profiles([plain])
    decoder = Decoder(model, store=store)
    with pytest.warns(PlainDecodingWarning):
        decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=9)
    decoder.save()
    (found,) = store.uses()
    assert (found.profile, found.tokens_per_forward) == (number, 1.0)


def test_a_model_that_changes_makes_no_request_wait_for_the_store(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    tuned(model, store)
    opens = Counting(store)
    decoder = Decoder(model, store=store, opens=opens, adapt=SURE)
    decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=9)
    monkeypatch.setattr(LanguageModel, "follow", lambda model: True)
    decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=9)
    assert opens.opened == 0
    decoder.save()
    assert [u.requests for u in store.uses()] == [2]


def test_choices_count_where_what_was_recorded_cannot_be_read(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    tuned(model, store)

    def damaged() -> list[Use]:
        raise ProfileStoreError("uses: database disk image is malformed")

    monkeypatch.setattr(store, "uses", damaged)
    with pytest.warns(StoreWarning, match=r"or learnt from: uses: database"):
        decoder = Decoder(model, store=store)
    result = decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=9)
    assert result.choice.strategy == "prompt_lookup"


@pytest.mark.parametrize("named", [True, False])
def test_what_was_recorded_is_written_where_it_was_read_wherever_the_program_moves(
    model: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    named: bool,
) -> None:
    places = [tmp_path / name for name in ("one", "another")]
    for place in places:
        place.mkdir()
        store = open_store(str(place / "a ? b.db"))
        tuned(model, store)
        store.close()
    monkeypatch.chdir(places[0])
    monkeypatch.setenv("ADAPTSPEC_DB", "a ? b.db")
    decoder = adaptspec.load(model, db="a ? b.db" if named else None)
    decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=9)
    monkeypatch.chdir(places[1])
    decoder.save()
    written = []
    for place in places:
        store = open_store(str(place / "a ? b.db"))
        written.append([use.requests for use in store.uses()])
        store.close()
    assert written == [[1], []]
