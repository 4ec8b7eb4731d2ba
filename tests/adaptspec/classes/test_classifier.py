"""Classes at run time: features of a text, scores, what is stored, what is chosen."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.classes.classifier import Classifier, best_record
from adaptspec.classes.last_message import LastMessage
from adaptspec.classes.text_features import (
    FEATURES,
    LONGEST_TEXT,
    features,
    prompt_text,
)
from adaptspec.decoder import Decoder
from adaptspec.errors import AdaptSpecError
from adaptspec.profile import EVERY_CLASS
from adaptspec.testing.fakes import tiny_model, tiny_tokenizer
from adaptspec.testing.stores import example_profile
from adaptspec_profiles.memory import MemoryStore
from classifiers import EVIDENCE, LONG, SHORT, by_hand
from decided import keep


def naive(text: str, bits: int) -> list[float]:
    """Counted with Python's own integers, one n-gram after the other."""
    raw = [byte + 1 for byte in f"\n{text.lower()}\n".encode("utf-8", "replace")]
    counts: Counter[int] = Counter()
    for size in (1, 2, 3):
        for at in range(len(raw) - size + 1):
            value = 0
            for byte in raw[at : at + size]:
                value = (value * 257 + byte) % 2**32
            counts[(value * 2654435761 % 2**32) >> (32 - bits)] += 1
    logs = [math.log(1 + counts[i]) for i in range(1 << bits)]
    length = math.sqrt(sum(value * value for value in logs))
    return [value / length for value in logs]


@pytest.mark.slow
@given(st.text(max_size=60))
def test_features_are_counts_of_hashed_ngrams(text: str) -> None:
    both = naive(text, 12) + [0.5 * value for value in naive(text[:40], 11)]
    length = math.sqrt(sum(value * value for value in both))
    expected = [value / length for value in both]
    assert features(text) == pytest.approx(expected, abs=1e-6)


@given(st.text(st.characters(), max_size=200))
def test_any_text_has_features_of_length_one(text: str) -> None:
    found = features(text)
    assert found.shape == (FEATURES,)
    assert np.linalg.norm(found) == pytest.approx(1.0, abs=1e-5)


def test_of_a_long_text_both_ends_are_read() -> None:
    half = LONGEST_TEXT // 2
    start, end = "a b " * (half // 4), "c d " * (half // 4)
    whole = features(f"{start}{'x' * 100_000}{end}")
    assert (whole == features(f"{start}{'y' * 999}{end}")).all()
    assert (whole != features(f"{start}{'x' * 9}{'c e ' * (half // 4)}")).any()


@pytest.mark.parametrize(("text", "name"), [(SHORT, "short"), (LONG, "long")])
def test_the_highest_score_is_told_with_its_probability(text: str, name: str) -> None:
    told = by_hand().tell(text)
    assert told.prompt_class == told.likeliest == name
    other = float(features(SHORT) @ features(LONG))
    # A softmax of two scores, 1 and the cosine of the two texts.
    expected = 1 / (1 + math.exp(20.0 * (other - 1.0)))
    assert told.confidence == pytest.approx(expected, abs=1e-2)
    assert f"{name!r}, {told.confidence:.0%} sure" in told.reason


def test_an_unsure_class_is_not_used_and_the_reason_says_so() -> None:
    told = by_hand(sharpness=0.5).tell(SHORT)
    assert told.likeliest == "short"
    assert told.prompt_class is None
    assert "isn't clear" in told.reason
    assert by_hand(sharpness=0.5, sure=0.5).tell(SHORT).prompt_class == "short"


def test_a_prompt_unlike_the_class_is_of_none_however_sure_the_scores_are() -> None:
    text = "写一首关于秋天的诗"
    told = by_hand(sharpness=1e4).tell(text)
    assert told.sure
    assert told.prompt_class is None
    assert told.reason == "the prompt is unlike any that was tuned on"
    assert by_hand(sharpness=1e4, unlike=-99.0).tell(text).prompt_class is not None


def test_it_comes_back_from_json_as_it_was() -> None:
    record = json.loads(json.dumps(by_hand().as_json()))
    again = Classifier.from_json(record)
    assert again.as_json() == record
    assert again.evidence == EVIDENCE
    for text in (SHORT, LONG, "w3"):
        assert again.tell(text) == by_hand().tell(text)


def test_nothing_of_a_text_is_stored() -> None:
    assert zlib.crc32(SHORT.encode()) not in np.unique(by_hand().weights)
    assert SHORT not in json.dumps(by_hand().as_json())


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 1},
        {"names": []},
        {"names": ["short"]},
        {"names": ["same", "same"]},
        {"weights": "AAAA"},
        {"weights": "not base 64"},
        {"weights": 3},
        {"offsets": [0.0]},
        {"offsets": [math.nan, 0.0]},
        {"sharpness": "sharp"},
        {"sharpness": math.inf},
        {"spread": [0.0, 0.1]},
        {"likeness": None},
        {"evidence": {"prompts": 3}},
        {"evidence": None},
    ],
    ids=lambda damage: json.dumps(damage)[:30],
)
def test_a_damaged_record_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(AdaptSpecError, match="classifier"):
        Classifier.from_json({**by_hand().as_json(), **damage})
    with pytest.raises(AdaptSpecError, match="classifier"):
        Classifier.from_json({})


def test_of_a_chat_the_last_message_counts_and_of_token_ids_nothing() -> None:
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "why?"}]
    assert prompt_text(chat) == "why?"
    assert prompt_text("text") == "text"
    assert prompt_text([1, 2, 3]) is None


def decoder(
    classifier: Classifier | None, classes: tuple[str, ...] = ("short", "long")
) -> Decoder:
    """Profiles of classes on a tiny model; the draft lengths tell them apart."""
    model = tiny_model("llama")
    model.tokenizer = tiny_tokenizer()
    store = MemoryStore()
    place = Decoder(model).environment
    measured = replace(example_profile().measurement, interval_low=1.2)
    lengths = {"short": 2, "long": 9, EVERY_CLASS: 5}
    keep(
        store,
        [
            example_profile(
                environment=place,
                prompt_class=name,
                strategy="prompt_lookup",
                params={"draft_length": lengths[name]},
                measurement=measured,
            )
            for name in classes
        ],
    )
    if classifier is not None:
        store.put_record("r1", "classifier", classifier.as_json())
    return Decoder(model, store=store)


def test_without_a_class_it_is_told_from_the_text() -> None:
    run = decoder(by_hand())
    short = run.generate(SHORT, max_new_tokens=2)
    assert short.choice.params["draft_length"] == 2
    assert short.choice.prompt_class == "short"
    assert short.choice.reason.startswith("class told from the text: 'short', ")
    assert "measured 1.50x" in short.choice.reason
    assert short.seconds_classifying > 0
    long = run.generate(LONG, max_new_tokens=2)
    assert long.choice.params["draft_length"] == 9
    by_ids = run.generate(run.model.encode(SHORT), max_new_tokens=2)
    assert by_ids.choice.prompt_class == "short"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sharpness": 0.5}, "class isn't clear from its text"),
        ({"unlike": 9.0}, "unlike any that was tuned on"),
    ],
)
def test_a_prompt_of_no_class_gets_the_choice_over_all_and_the_reason(
    changes: dict[str, Any], said: str
) -> None:
    run = decoder(by_hand(**changes), ("short", "long", EVERY_CLASS))
    found = run.generate(SHORT, max_new_tokens=2)
    assert found.choice.strategy == "prompt_lookup"
    assert found.choice.params["draft_length"] == 5
    assert said in found.choice.reason
    assert "measured 1.50x" in found.choice.reason


def test_a_stream_tells_its_choice_and_what_classifying_took() -> None:
    run = decoder(by_hand())
    stream = run.stream(SHORT, max_new_tokens=4)
    assert stream.choice.prompt_class == "short"
    text = "".join(stream)
    assert stream.seconds_classifying > 0
    result = stream.result
    assert result.text == text == run.generate(SHORT, max_new_tokens=4).text
    assert result.seconds_classifying == stream.seconds_classifying
    assert run.stream("w1", prompt_class="long").seconds_classifying == 0


TEMPLATE = (
    "w90 w91 {% for m in messages %}w92 {{ m['role'] }} w93 {{ m['content'] }} w94 "
    "{% endfor %}{% if add_generation_prompt %}w95 {% endif %}"
)


class Words:
    """A tokenizer of words, so that a template can be looked at."""

    chat_template: str | None = TEMPLATE

    decoded = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.decoded += len(ids)
        return "".join(self.words[i] for i in ids)

    def apply_chat_template(self, chat: Any, **asked: Any) -> str:
        import jinja2

        return str(
            jinja2.Template(TEMPLATE).render(
                messages=chat, add_generation_prompt=asked["add_generation_prompt"]
            )
        )

    def encode(self, text: str) -> list[int]:
        self.words = [f"{word} " for word in text.split(" ")[:-1]]
        return list(range(len(self.words)))


def test_token_ids_of_a_chat_are_classified_by_what_was_said_last() -> None:
    words = Words()
    chat = [
        {"role": "system", "content": "w1 w2"},
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4 w5"},
        {"role": "user", "content": "w6 w7"},
    ]
    for messages in (chat, chat[:2], chat[1:2]):
        text = words.apply_chat_template(messages, add_generation_prompt=True)
        said = LastMessage(words)(words.encode(text))
        assert said.split() == messages[-1]["content"].split()
    plain = words.encode("w6 w7 w8 ")
    assert LastMessage(words)(plain) == "w6 w7 w8 "
    words.chat_template = None
    assert LastMessage(words)(plain) == "w6 w7 w8 "


def test_of_many_token_ids_the_ends_are_read() -> None:
    words = Words()
    body = " ".join(f"w{i}" for i in range(100, 200))
    long = [{"role": "user", "content": body}]
    ids = words.encode(words.apply_chat_template(long, add_generation_prompt=True))
    said = LastMessage(words, most=20)(ids).split()
    # Of each end some tokens are the template's.
    assert (said[0], said[-1]) == ("w100", "w199")
    assert "w150" not in said
    assert words.decoded == 40
    last = [*long, {"role": "user", "content": "w7"}]
    ids = words.encode(words.apply_chat_template(last, add_generation_prompt=True))
    assert LastMessage(words, most=20)(ids).split()[-1] == "w7"


def test_a_class_that_is_given_wins_and_asks_no_classifier() -> None:
    found = decoder(by_hand()).generate(SHORT, prompt_class="long", max_new_tokens=2)
    assert found.choice.params["draft_length"] == 9
    assert "told" not in found.choice.reason


def test_without_a_classifier_nothing_is_classified() -> None:
    run = decoder(None, (EVERY_CLASS,))
    assert run.classify(SHORT) is None
    found = run.generate("w1", max_new_tokens=2)
    assert found.seconds_classifying == 0
    assert found.choice.params["draft_length"] == 5


@pytest.mark.parametrize("damage", [{"format": 1}, {"weights": "AAAA"}])
def test_an_unusable_classifier_is_told_and_does_without(
    damage: dict[str, Any],
) -> None:
    model = tiny_model("llama")
    store = MemoryStore()
    place = Decoder(model).environment
    keep(store, [example_profile(environment=place)])
    store.put_record("r1", "classifier", {**by_hand().as_json(), **damage})
    with pytest.warns(UserWarning, match="classes can't be told"):
        run = Decoder(model, store=store)
    assert run.classify("x") is None


def test_the_newest_run_that_learnt_classes_tells_them() -> None:
    run = decoder(by_hand())
    store = MemoryStore()
    for name, year in (("old", 2025), ("new", 2026), ("newest", 2027)):
        created = example_profile().created.replace(year=year)
        keep(
            store,
            [example_profile(run=name, environment=run.environment, created=created)],
        )
    store.put_record("old", "classifier", by_hand(names=["a", "b"]).as_json())
    store.put_record("new", "classifier", by_hand(names=["c", "d"]).as_json())
    told = Decoder(run.model, store=store).classify(SHORT)
    assert told is not None
    assert told.likeliest == "c"


def learnt_from(prompts: int, *names: str) -> dict[str, Any]:
    """A record as far as it is looked at to choose one."""
    evidence = {**vars(by_hand().evidence), "prompts": prompts}
    return {**by_hand().as_json(), "names": list(names), "evidence": evidence}


def test_a_classifier_of_few_prompts_or_classes_replaces_no_better_one() -> None:
    whole = learnt_from(64, "a", "b", "c", "d", "e", "f", "g", "h")
    smoke = learnt_from(16, "a", "b", "c", "d", "e", "f", "g", "h")
    narrow = learnt_from(200, "a", "b")
    again = learnt_from(40, "a", "b", "c", "d", "e", "f")
    damaged = {**learnt_from(999, *map(str, range(20))), "format": 1}

    def best(*found: dict[str, Any], pinned: dict[str, Any] | None = None) -> Any:
        return best_record([(one is pinned, one) for one in found])

    assert best(whole, smoke) is whole
    assert best(whole, narrow) is whole
    assert best(whole, damaged) is whole
    assert best(whole, again) is again
    assert best(again, whole) is whole
    assert best(whole, smoke, pinned=smoke) is smoke
    assert best(damaged) is damaged  # to be refused by whoever reads it
