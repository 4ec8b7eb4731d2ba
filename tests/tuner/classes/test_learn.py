"""A classifier is learnt from prompts; prompts unlike all classes get none."""

from __future__ import annotations

import json
import random
import warnings
from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptspec_plugins
from adaptspec.classes.classifier import KEY, Classifier
from adaptspec.classes.text_features import features
from adaptspec.decoder import Decoder
from adaptspec.host import Host
from adaptspec.profile import EVERY_CLASS
from adaptspec.testing.fakes import tiny_model, tiny_tokenizer
from adaptspec.workloads import Prompt, Workload
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.classes.learn import grouped, learn
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.reporting.stored import build
from adaptspec_tuner.tune import tune

WORDS = {
    "cook": "boil the rice and fry an onion with salt pepper butter garlic",
    "sums": "how many apples are 7 plus 12 minus 3 times 45 divided by 9",
    "code": "def main(x): return [y for y in x if y != None] # TODO {}",
}


def prompts(per_class: int, *names: str, seed: int = 0) -> list[Prompt]:
    """Of each class texts of its words in random order."""
    draw = random.Random(seed)
    return [
        Prompt(f"{name}{i}", name, " ".join(draw.sample(WORDS[name].split(), 8)))
        for name in names or WORDS
        for i in range(per_class)
    ]


def test_new_prompts_of_the_classes_are_told() -> None:
    classifier = learn(prompts(8))
    assert classifier is not None
    for prompt in prompts(10, seed=1):
        told = classifier.tell(prompt.text or "")
        assert told.likeliest == prompt.prompt_class
    assert classifier.evidence.prompts == 24
    assert classifier.evidence.accuracy == 1.0
    assert classifier.evidence.told_accuracy == 1.0
    assert classifier.evidence.told > 0.8
    assert "24 prompts" in classifier.evidence.describe()


@pytest.mark.parametrize(
    "text",
    [
        "Напиши короткий рассказ о кошке, которая живёт на маяке",  # noqa: RUF001
        "请把下面的句子翻译成英文：今天天气很好",  # noqa: RUF001
        "0x3f|0x9a|0x11|0xde|0xad|0xbe|0xef",
        "",
    ],
)
def test_a_prompt_in_another_script_is_of_no_class(text: str) -> None:
    classifier = learn(prompts(8))
    assert classifier is not None
    told = classifier.tell(text)
    assert not told.like
    assert told.prompt_class is None


def test_labels_that_the_text_does_not_tell_are_not_claimed() -> None:
    draw = random.Random(0)
    mixed = [
        Prompt(str(i), draw.choice(["a", "b"]), p.text)
        for i, p in enumerate(prompts(40, "cook"))
    ]
    classifier = learn(mixed)
    assert classifier is not None
    assert classifier.evidence.accuracy < 0.75
    assert classifier.evidence.told < 0.5


def test_near_equal_prompts_are_held_out_together() -> None:
    """The same few texts under drawn labels: copies on both sides would tell them."""
    texts = [p.text or "" for p in prompts(6)]
    draw = random.Random(1)
    labels = [draw.choice(["a", "b"]) for _ in texts]
    copied = [
        Prompt(f"{i}-{copy}", label, f"{text}{'.' * copy}")
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
        for copy in range(4)
    ]
    together, apart = learn(copied), learn(copied, near_equal=1.1)
    assert together is not None
    assert apart is not None
    assert apart.evidence.accuracy > 0.9
    assert together.evidence.accuracy < 0.75


def test_groups_are_chains_of_near_equal_ones() -> None:
    angles = np.array([0.0, 0.3, 0.6, 2.0, 2.2])
    table = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = grouped(table @ table.T, np.cos(0.35)).tolist()
    assert found == [found[0]] * 3 + [found[3]] * 2
    assert found[0] != found[3]


def test_fewer_than_two_classes_need_no_classifier() -> None:
    assert learn([]) is None
    assert learn(prompts(9, "cook")) is None


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=30), st.sampled_from("abc")), min_size=1, max_size=12
    )
)
def test_any_prompts_give_a_classifier_that_can_be_stored(
    given_: list[tuple[str, str]],
) -> None:
    found = learn([Prompt(str(i), c, text) for i, (text, c) in enumerate(given_)])
    if found is None:
        assert len({name for _, name in given_}) < 2
        return
    again = Classifier.from_json(json.loads(json.dumps(found.as_json())))
    for text, _ in given_:
        assert again.tell(text) == found.tell(text)
        assert 0 < found.tell(text).confidence <= 1


@pytest.mark.slow
def test_scores_are_those_of_ridge_regression_on_the_features() -> None:
    """Solved in the primal here, among the prompts there."""
    some = prompts(3)
    classifier = learn(some, ridge=0.5)
    assert classifier is not None
    table = np.stack([features(p.text or "") for p in some]).astype(np.float64)
    centred = table - table.mean(axis=0)
    wanted = np.repeat(np.eye(3), 3, axis=0)
    gram = centred.T @ centred + 0.5 * np.eye(table.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (wanted - 1 / 3))
    assert classifier.weights == pytest.approx(weights, abs=2e-3)
    scores = table @ classifier.weights + classifier.offsets
    assert scores == pytest.approx(centred @ weights + 1 / 3, abs=1e-2)


@pytest.mark.slow
def test_a_tune_learns_classes_that_the_decoder_tells() -> None:
    """From `tune` to `generate` without a class, with a real tiny model."""
    model = tiny_model("llama", tokenizer=tiny_tokenizer())
    draw = random.Random(2)
    some = tuple(
        Prompt(f"{name}{i}", name, " ".join(f"w{draw.choice(ids)}" for _ in range(9)))
        for name, ids in (("low", range(3, 9)), ("high", range(50, 60)))
        for i in range(4)
    )
    store, host = MemoryStore(), Host({"bundled": adaptspec_plugins})
    options = TuneOptions(
        budget_trials=1, strategies=["prompt_lookup"], max_new_tokens=6
    )
    workload = Workload("mine", some)
    result = tune(model, workload=workload, options=options, db=store, host=host)
    record = store.record(result.run, KEY)
    assert record is not None
    assert Classifier.from_json(record).evidence.prompts == 8
    created = datetime.fromisoformat(record["created"])  # imports go by it
    assert created.utcoffset() == timedelta(0)
    assert any("told from its text" in note for note in result.notes)
    report = build(store)
    assert report.classifier is not None
    assert report.classifier["accuracy"] >= 0.75
    used = Decoder(model, store=store, host=host)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that plain decoding is chosen
        found = used.generate("w51 w55 w52 w58 w53 w50 w57 w59", max_new_tokens=4)
        strange = used.generate("ж з и й к л м н", max_new_tokens=4)
    assert strange.choice.prompt_class == EVERY_CLASS
    assert "unlike any that was tuned on" in strange.choice.reason
    assert found.choice.prompt_class == "high"
    assert "'high'" in found.choice.reason
    assert found.seconds_classifying > 0
