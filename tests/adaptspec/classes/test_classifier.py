"""Discovered classes at run time: features, the tree of questions, its stored form."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.classes.classifier import UNKNOWN, Classifier, Question
from adaptspec.classes.last_message import last_message
from adaptspec.classes.text_features import FEATURES, features, prompt_text
from adaptspec.decoder import Decoder
from adaptspec.errors import AdaptSpecError
from adaptspec.testing.fakes import tiny_model, tiny_tokenizer
from adaptspec.testing.stores import example_profile
from adaptspec_profiles.memory import MemoryStore
from decided import keep

WIDTH = len(FEATURES)
ANYTHING = ([-1e9] * WIDTH, [1e9] * WIDTH)


def of(text: str) -> dict[str, float]:
    return dict(zip(FEATURES, features(text), strict=True))


def test_features_say_what_their_names_do() -> None:
    found = of("a b c d a b c d")
    assert found["length"] == pytest.approx(math.log(9))
    assert found["repetition"] == pytest.approx(1 / 5)
    assert found["vocabulary"] == 0.5
    code = of("def f(x):\n    return x[0] + 1")
    prose = of("Please tell me how the weather will be.")
    assert code["symbols"] > prose["symbols"] == 0
    assert code["indented"] == 0.5
    assert of("Why is it so?")["question"] == 1
    assert of("Grüße")["foreign"] == pytest.approx(2 / 5)
    assert of("12ab")["digits"] == 0.5


@given(st.text())
def test_any_text_has_finite_features_and_one_class(text: str) -> None:
    found = features(text)
    assert len(found) == WIDTH
    assert all(math.isfinite(value) for value in found)
    tree = Classifier(["x", "y"], [Question(0, 1.0, -1, -2)], *ANYTHING)
    assert tree.classify(text) == ("x" if found[0] <= 1.0 else "y")


TREE = Classifier(
    ["short", "code", "long"],
    [Question(0, 2.0, -1, 1), Question(3, 0.05, -3, -2)],
    *ANYTHING,
)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("two words", "short"),
        ("x = {y[z]: (a + b) for a, b in c} # and so on = [] () {} ; : &", "code"),
        ("a sentence of several words that is neither short nor code", "long"),
    ],
)
def test_questions_lead_to_a_class(text: str, name: str) -> None:
    assert TREE.classify(text) == name


def test_it_tells_its_classes_in_words() -> None:
    assert TREE.describe() == [
        "short: length <= 2",
        "code: length > 2 and symbols > 0.05",
        "long: length > 2 and symbols <= 0.05",
    ]
    assert Classifier(["all"], [], *ANYTHING).describe() == ["all: every prompt"]


def test_a_prompt_beyond_what_was_seen_is_unknown() -> None:
    narrow = replace(TREE, high=[5.0, *[1e9] * (WIDTH - 1)])
    assert narrow.classify("two words") == "short"
    assert narrow.classify("word " * 1000) == UNKNOWN


def test_it_comes_back_from_json_as_it_was() -> None:
    assert Classifier.from_json(json.loads(json.dumps(TREE.as_json()))) == TREE


# What earlier versions stored with `--class-features states`.
OF_STATES = {"features": ["state 1", "rest"], "states": {"layer": 1, "mean": [0.0]}}


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 2},
        {"features": ["length"]},
        OF_STATES,
        {"names": []},
        {"questions": [[0, 1.0, 0, -1]]},  # asks itself for ever
        {"questions": [[0, 1.0, -1, -9]]},  # a class that isn't
        {"questions": [[99, 1.0, -1, -2]]},
        {"questions": [[0, 1.0]]},
        {"low": [0.0]},
        {"high": [math.inf] * WIDTH},
        {"seconds": "soon"},
        {"seconds": math.nan},
        {"names": ["same", "same", "long"]},
        {"names": ["short", "unknown", "long"]},
        {"questions": [[0, math.nan, -1, -2]]},
        {"questions": [[0, math.inf, -1, -2]]},
        {"questions": [[math.inf, 1.0, -1, -2]]},
        {"questions": [[0.5, 1.0, -1, -2]]},
    ],
)
def test_a_damaged_record_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(AdaptSpecError, match="classifier"):
        Classifier.from_json({**TREE.as_json(), **damage})
    with pytest.raises(AdaptSpecError, match="classifier"):
        Classifier.from_json({})


def test_of_a_chat_the_last_message_counts_and_of_token_ids_nothing() -> None:
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "why?"}]
    assert prompt_text(chat) == "why?"
    assert prompt_text("text") == "text"
    assert prompt_text([1, 2, 3]) is None


def decoder(classifier: Classifier | None) -> Decoder:
    """Profiles of ``short`` and ``long`` on a tiny model."""
    model = tiny_model("llama")
    model.tokenizer = tiny_tokenizer()
    store = MemoryStore()
    place = Decoder(model).environment
    measured = replace(example_profile().measurement, interval_low=1.2)
    keep(
        store,
        [
            example_profile(
                environment=place,
                prompt_class=name,
                strategy="prompt_lookup",
                params={"draft_length": tokens},
                measurement=measured,
            )
            for name, tokens in (("short", 2), ("long", 9))
        ],
    )
    if classifier is not None:
        store.put_record("r1", "classifier", classifier.as_json())
    return Decoder(model, store=store)


def test_without_a_class_the_discovered_one_is_used() -> None:
    run = decoder(TREE)
    short = run.generate("w1 w2", max_new_tokens=2)
    assert short.choice.params["draft_length"] == 2
    assert short.choice.prompt_class == "short"
    assert short.seconds_classifying > 0
    long = run.generate("w1 " * 20, max_new_tokens=2)
    assert long.choice.params["draft_length"] == 9
    by_ids = run.generate(run.model.encode("w1 w2"), max_new_tokens=2)
    assert by_ids.choice.prompt_class == "short"


def test_a_stream_tells_its_choice_and_what_classifying_took() -> None:
    run = decoder(TREE)
    stream = run.stream("w1 w2", max_new_tokens=4)
    assert stream.choice.prompt_class == "short"
    text = "".join(stream)
    assert stream.seconds_classifying > 0
    result = stream.result
    assert result.text == text == run.generate("w1 w2", max_new_tokens=4).text
    assert result.seconds_classifying == stream.seconds_classifying
    assert run.stream("w1", prompt_class="long").seconds_classifying == 0


TEMPLATE = (
    "w90 w91 {% for m in messages %}w92 {{ m['role'] }} w93 {{ m['content'] }} w94 "
    "{% endfor %}{% if add_generation_prompt %}w95 {% endif %}"
)


class Words:
    """A tokenizer of words, so that a template can be looked at."""

    chat_template: str | None = TEMPLATE

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
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
        said = last_message(words, words.encode(text))
        assert said.split() == messages[-1]["content"].split()
    plain = words.encode("w6 w7 w8 ")
    assert last_message(words, plain) == "w6 w7 w8 "
    words.chat_template = None
    assert last_message(words, plain) == "w6 w7 w8 "


def test_a_class_that_is_given_wins_and_asks_no_classifier() -> None:
    found = decoder(TREE).generate("w1 w2", prompt_class="long", max_new_tokens=2)
    assert found.choice.params["draft_length"] == 9


def test_a_prompt_unlike_any_gets_the_choice_over_all_classes() -> None:
    narrow = replace(TREE, high=[3.0, *[1e9] * (WIDTH - 1)])
    found = decoder(narrow).generate("w1 " * 40, max_new_tokens=2)
    assert found.choice.strategy == "prompt_lookup"
    assert "no class was told" in found.choice.reason


def test_without_discovered_classes_nothing_is_classified() -> None:
    run = decoder(None)
    assert run.classify("w1 w2") is None
    assert run.generate("w1", max_new_tokens=2).seconds_classifying == 0


@pytest.mark.parametrize("damage", [{"questions": [[0, 1.0]]}, OF_STATES])
def test_an_unusable_classifier_is_told_and_does_without(
    damage: dict[str, Any],
) -> None:
    model = tiny_model("llama")
    store = MemoryStore()
    place = Decoder(model).environment
    keep(store, [example_profile(environment=place)])
    store.put_record("r1", "classifier", {**TREE.as_json(), **damage})
    with pytest.warns(UserWarning, match="classes aren't discovered"):
        run = Decoder(model, store=store)
    assert run.classify("x") is None


@pytest.mark.slow
def test_running_needs_no_scikit_learn() -> None:
    code = "import sys, adaptspec.decoder; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
