"""The choice is a function of what tunes decided, and its reason is true."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.errors import ProfileStoreError
from adaptspec.profile import EVERY_CLASS, PLAIN, ClassChoice, Pick
from adaptspec.selector import best_evidence, select
from adaptspec.testing.stores import example_choice

HERE = example_choice().environment
BARE = replace(HERE, draft=None, draft_name=None, heads=None, heads_name=None)


def pick(strategy: str = "a", ratio: float = 1.5, **changes: Any) -> Pick:
    known = {
        "reason": f"measured {ratio:.2f}x",
        "low": ratio - 0.1,
        "high": ratio + 0.1,
    }
    return Pick(strategy, {}, ratio=ratio, **{**known, **changes})


def decided(
    *picks: Pick, day: int = 0, where: dict[str, Any] | None = None, **changes: Any
) -> ClassChoice:
    """Of the run of that day, which tried what it chose."""
    return example_choice(
        picks=list(picks),
        created=example_choice().created + timedelta(days=day),
        environment=replace(HERE, **(where or {})),
        **{"run": f"r{day}", "tried": ["a", "b", "c"], **changes},
    )


def test_the_best_setting_is_used_with_its_reason() -> None:
    choice = select([decided(pick("a", 1.8), pick("b", 1.3))], HERE, "chat")
    assert (choice.strategy, choice.prompt_class, choice.run) == ("a", "chat", "r0")
    assert choice.reason == "measured 1.80x"


def test_plain_decoding_that_was_decided_says_why() -> None:
    choice = select([decided()], HERE, "chat")
    assert choice.strategy == PLAIN
    assert choice.reason == "plain decoding: nothing is reliably faster"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"model": "m2"}, "model m2"),
        ({"configuration": "c2"}, "configuration c2 (here c1)"),
        (
            {"kernel": "none bfloat16"},
            "kernel none bfloat16 (here packed bfloat16)",
        ),
        ({"attention": "eager"}, "attention eager (here sdpa)"),
        ({"device_name": "Another CPU"}, "device_name Another CPU (here A CPU)"),
        (
            {"dtype": "float32", "model": "m2"},
            "with dtype float32 (here bfloat16); load with dtype='float32', or run",
        ),
    ],
)
def test_what_was_decided_elsewhere_says_nothing_here(
    where: dict[str, Any], said: str
) -> None:
    choice = select([decided(pick(), where=where)], HERE, "chat")
    assert choice.strategy == PLAIN
    assert said in choice.reason


def test_what_an_older_version_didnt_know_is_not_compared() -> None:
    unknown = {"configuration": None, "kernel": None, "attention": None}
    assert select([decided(pick(), where=unknown)], HERE, "chat").strategy == "a"


def test_other_threads_are_told_and_those_of_here_come_first() -> None:
    other = decided(pick("b", 2.0), day=1, where={"threads": 8})
    choice = select([other], HERE, "chat")
    assert choice.strategy == "b"
    assert "measured with threads 8 (here 2)" in choice.reason
    assert select([decided(pick("a")), other], HERE, "chat").strategy == "a"


def test_packed_weights_and_those_read_as_they_lie_serve_each_other() -> None:
    lying = decided(pick("b", 2.0), day=1, where={"kernel": "native bfloat16"})
    choice = select([lying], HERE, "chat")
    assert choice.strategy == "b"
    told = "measured with kernel native bfloat16 (here packed bfloat16)"
    assert told in choice.reason
    choice = select([decided(pick("a")), lying], HERE, "chat")
    assert (choice.strategy, choice.reason) == ("a", "measured 1.50x")


@pytest.mark.parametrize("wanted", [None, "poems"])
def test_without_a_class_or_with_an_unknown_one_the_choice_over_all_is_used(
    wanted: str | None,
) -> None:
    of_chat, of_code = decided(pick("a")), decided(pick("b"), prompt_class="code")
    over_all = decided(pick("c"), prompt_class=EVERY_CLASS)
    choice = select([of_chat, of_code, over_all], HERE, wanted)
    assert (choice.strategy, choice.prompt_class) == ("c", EVERY_CLASS)
    said = "no class was told" if wanted is None else "class 'poems' isn't profiled"
    assert said in choice.reason


@pytest.mark.parametrize("wanted", [None, "poems"])
def test_an_older_tune_without_a_choice_over_all_serves_too(wanted: str | None) -> None:
    few = decided(pick("a"), prompts=2)
    many = decided(pick("b"), prompt_class="code", prompts=9)
    default = decided(pick("c"), prompt_class="default", prompts=1)
    assert select([few, many, default], HERE, wanted).strategy == "c"
    choice = select([few, many], HERE, wanted)
    assert choice.strategy == "b"
    assert "'code' is used, which rests on most prompts" in choice.reason


def test_without_what_a_setting_needs_the_next_best_serves() -> None:
    best = pick("draft_model", 2.1, needs_draft=True)
    second = pick("medusa", 1.9, needs_heads=True)
    found = decided(best, second, pick("suffix", 1.4))
    assert select([found], HERE, "chat").strategy == "draft_model"
    choice = select([found], BARE, "chat")
    assert choice.strategy == "suffix"
    assert (
        "draft_model was 2.10x with the draft model draft (draft_model=, --draft-model)"
        in choice.reason
    )
    assert "medusa was 1.90x with the heads heads (heads=, --heads)" in choice.reason
    alone = select([decided(best)], BARE, "chat")
    assert alone.strategy == PLAIN
    assert "draft_model was 2.10x with the draft model draft" in alone.reason
    another = replace(HERE, draft="d2")
    assert select([found], another, "chat").strategy == "medusa"


def test_heads_that_a_setting_doesnt_ask_are_told_to_be_untried() -> None:
    bare = decided(pick("a"), where={"heads": None, "heads_name": None})
    choice = select([bare], HERE, "chat")
    assert choice.strategy == "a"
    assert "measured without heads: run tune with them" in choice.reason


def test_a_setting_that_is_refused_gives_way_to_the_next() -> None:
    found = decided(pick("a"), pick("b"))
    refused = {"a": "it is gone", "b": None}
    choice = select([found], HERE, "chat", refused=lambda pick: refused[pick.strategy])
    assert choice.strategy == "b"
    assert "a is left out: it is gone" in choice.reason


def test_a_lossy_setting_is_used_only_if_it_is_allowed() -> None:
    found = decided(pick("loose", 2.0, lossless=False), pick("a"))
    assert select([found], HERE, "chat").strategy == "a"
    choice = select([found], HERE, "chat", lossy={"loose"})
    assert (choice.strategy, choice.lossless) == ("loose", False)


def test_another_patch_is_used_and_told() -> None:
    now = replace(HERE, versions={"torch": "2.13.1"})
    choice = select([decided(pick())], now, "chat")
    assert choice.strategy == "a"
    assert "torch 2.13 then, 2.13.1 now" in choice.reason
    assert "stale" not in choice.reason


@pytest.mark.parametrize(("low", "used"), [(1.2, "a"), (1.05, PLAIN), (0.9, PLAIN)])
def test_another_minor_version_makes_a_choice_stale(low: float, used: str) -> None:
    now = replace(HERE, versions={"torch": "2.14.0"})
    choice = select([decided(pick(low=low))], now, "chat")
    assert choice.strategy == used
    assert "torch 2.13 then, 2.14.0 now" in choice.reason
    assert "run tune again" in choice.reason


def test_one_run_may_be_asked_for() -> None:
    old, new = decided(pick("a")), decided(pick("b"), day=1)
    assert select([old, new], HERE, "chat", run="r0").strategy == "a"
    with pytest.raises(ProfileStoreError, match="profiles list"):
        select([old, new], HERE, "chat", run="r7")


STALE = {"versions": {"torch": "1.0"}}
GOOD = decided(pick("a", 2.0), prompts=12)


@pytest.mark.parametrize(
    ("newer", "used"),
    [
        (decided(pick("b"), day=1, prompts=12), "b"),  # as many prompts: the newer
        (decided(pick("b"), day=1, prompts=6), "b"),
        (decided(pick("b"), day=1, prompts=5), "a"),  # a smoke run
        (decided(day=1, prompts=1), "a"),
        (decided(pick("b"), day=1, prompts=12, where={"versions": {}}), "b"),
        (
            decided(pick("b"), day=1, prompts=12, where={"versions": {"torch": "1.0"}}),
            "a",
        ),
        # It never tried what the older one chose.
        (decided(pick("b", 1.9), day=1, prompts=12, tried=["b"]), "a"),
        (decided(pick("b", 2.1), day=1, prompts=12, tried=["b"]), "b"),
        (decided(pick("b"), day=1, prompts=1, pinned=True), "b"),
        (decided(day=1, prompts=12), PLAIN),
    ],
)
def test_a_newer_tune_replaces_an_older_one_only_by_better_evidence(
    newer: ClassChoice, used: str
) -> None:
    assert select([GOOD, newer], HERE, "chat").strategy == used
    assert select([newer, GOOD], HERE, "chat").strategy == used


def test_what_the_whole_answer_took_counts_before_other_objectives() -> None:
    answer = decided(pick("a", 1.5), prompts=9, objective="answer")
    latency = decided(pick("b", 3.0), day=1, prompts=9, objective="latency")
    assert select([answer, latency], HERE, "chat").strategy == "a"
    assert select([latency], HERE, "chat").strategy == "b"
    # Ratios of different objectives aren't compared, either.
    speed = decided(pick("a", 1.5), prompts=9, objective="speed")
    untried = replace(latency, tried=["b"])
    assert select([speed, untried], HERE, "chat").strategy == "a"


def test_a_run_of_few_classes_does_not_speak_for_all() -> None:
    broad = [
        decided(pick("a"), prompt_class=name, prompts=4)
        for name in ("chat", "code", "json", EVERY_CLASS)
    ]
    narrow = [
        decided(pick("b"), day=1, prompt_class=name, prompts=40)
        for name in ("chat", EVERY_CLASS)
    ]
    choices = [*broad, *narrow]
    assert select(choices, HERE, None).strategy == "a"
    # What `tune` prints of all classes is what serves a prompt without a class.
    assert select(choices, HERE, EVERY_CLASS).strategy == "a"
    assert select(choices, HERE, "chat").strategy == "b"
    pinned = [replace(choice, pinned=True) for choice in narrow]
    assert select([*broad, *pinned], HERE, None).strategy == "b"


picks = st.lists(
    st.builds(
        pick,
        st.sampled_from("abc"),
        st.floats(1.0, 3.0),
        needs_draft=st.booleans(),
        lossless=st.booleans(),
    ),
    max_size=3,
)
choices = st.lists(
    st.builds(
        lambda picks, **changes: decided(*picks, **changes),
        picks,
        day=st.integers(0, 4),
        prompts=st.integers(1, 20),
        pinned=st.booleans(),
        tried=st.lists(st.sampled_from("abc")),
        where=st.sampled_from(
            [{}, {}, {"threads": 8}, {"draft": None}, {"versions": {"torch": "1.0"}}]
        ),
    ),
    max_size=5,
    unique_by=lambda choice: choice.run,
)


@given(choices, st.integers(0, 99))
def test_the_order_of_choices_doesnt_matter(
    found: list[ClassChoice], seed: int
) -> None:
    shuffled = list(found)
    random.Random(seed).shuffle(shuffled)
    assert select(found, HERE, "chat") == select(shuffled, HERE, "chat")


@given(choices, st.sampled_from([{"model": "m2"}, {"kernel": "none"}]), picks)
def test_what_was_decided_elsewhere_changes_nothing(
    found: list[ClassChoice], where: dict[str, str], more: list[Pick]
) -> None:
    other = decided(*more, day=9, where=where, pinned=True)
    if found:
        assert select([*found, other], HERE, "chat") == select(found, HERE, "chat")


@given(choices.filter(bool))
def test_what_is_used_is_what_the_best_evidence_chose(found: list[ClassChoice]) -> None:
    """The rule, said once more: every condition alone."""
    best = best_evidence(found, HERE)
    assert best.pinned or not any(choice.pinned for choice in found)
    alike = [
        choice
        for choice in found
        if choice.pinned == best.pinned and choice.environment == best.environment
    ]
    assert best.prompts * 2 >= max(choice.prompts for choice in alike)
    choice = select(found, HERE, "chat")
    attached = best.environment.draft == HERE.draft
    usable = [p for p in best.picks if p.lossless and (attached or not p.needs_draft)]
    if best.environment.versions == HERE.versions:
        assert choice.strategy == (usable[0].strategy if usable else PLAIN)
