"""Classes told by the target's states: what is read, kept, and decoded behind it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import adaptspec_plugins
from adaptspec.classes.classifier import STATES, UNKNOWN, Classifier, Question
from adaptspec.classes.state_features import StateFeatures, pooled, states_layer
from adaptspec.decoder import UNLIKE, Decoder
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.errors import AdaptSpecError, NoHiddenStatesError
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.profile import PLAIN
from adaptspec.strategy import (
    Context,
    Drafter,
    Observes,
    Outcome,
    Strategy,
    Target,
    TokenTree,
    union,
)
from adaptspec.testing.fakes import noisy_draft, random_ids, tiny_model, tiny_tokenizer
from adaptspec.testing.stores import example_profile
from adaptspec_profiles.memory import MemoryStore

HOST = Host({"bundled": adaptspec_plugins})
WIDTH = 32  # of the tiny models' states
LAYER = 1


def first_axis(middle: float = 0.0) -> StateFeatures:
    """Looks at the first number of a state alone."""
    mean = [middle, *[0.0] * (WIDTH - 1)]
    return StateFeatures(LAYER, mean, [1.0] * WIDTH, [[1.0, *[0.0] * (WIDTH - 1)]])


def test_a_pooled_state_is_the_mean_of_rows_brought_to_one_size() -> None:
    states = torch.tensor([[3.0, 4.0], [300.0, -400.0]])
    size = math.sqrt(12.5)
    assert pooled(states) == pytest.approx([3 / size, 0.0], abs=1e-6)
    assert pooled(states * 1e3) == pytest.approx(pooled(states), abs=1e-6)
    assert pooled(torch.zeros(2, 3)) == [0, 0, 0]
    assert pooled(states.bfloat16()) == pytest.approx(pooled(states), abs=1e-2)


def test_features_are_the_place_along_the_directions_and_what_these_leave() -> None:
    chance = np.random.default_rng(0)
    directions = np.linalg.qr(chance.normal(size=(5, 5)))[0][:2]
    mean, scale = chance.normal(size=5), chance.uniform(0.5, 2, size=5)
    found = StateFeatures(1, list(mean), list(scale), directions.tolist())
    state = chance.normal(size=5)
    z = (state - mean) / scale
    left = z - directions.T @ (directions @ z)
    assert found(list(state)) == pytest.approx(
        [*(directions @ z), np.sqrt(np.mean(left**2))]
    )
    assert found.names == ("state 1", "state 2", "rest")
    assert found(list(mean)) == pytest.approx([0, 0, 0])


def two_classes(threshold: float, features: StateFeatures) -> Classifier:
    low, high = [-1e9, -1e9], [1e9, 1e9]
    return Classifier(
        ["low", "high"], [Question(0, threshold, -1, -2)], low, high, 0.1, features
    )


def test_a_classifier_of_states_comes_back_from_json_as_it_was() -> None:
    found = two_classes(0.25, first_axis())
    assert Classifier.from_json(json.loads(json.dumps(found.as_json()))) == found
    assert found.source == STATES
    assert found.describe() == ["low: state 1 <= 0.25", "high: state 1 > 0.25"]
    assert found.classify_state([0.25, *[0.0] * (WIDTH - 1)]) == "low"
    assert found.classify_state([0.26, *[0.0] * (WIDTH - 1)]) == "high"


@pytest.mark.parametrize(
    "damage",
    [
        {"pooling": "another"},
        {"layer": -1},
        {"layer": 1.5},
        {"mean": []},
        {"mean": [math.nan] * WIDTH},
        {"scale": [0.0] * WIDTH},
        {"scale": [1.0]},
        {"directions": []},
        {"directions": [[1.0]]},
        {"directions": None},
    ],
)
def test_damaged_features_of_states_are_refused(damage: dict[str, Any]) -> None:
    record = two_classes(0.0, first_axis()).as_json()
    for broken in ({**record["states"], **damage}, "text", [1]):
        with pytest.raises(AdaptSpecError, match=r"classifier|states"):
            Classifier.from_json({**record, "states": broken})
    with pytest.raises(AdaptSpecError, match="another version's"):
        Classifier.from_json({**record, "states": None})


class Watching(Strategy):
    """Proposes nothing and remembers what it was shown."""

    name = "watching"
    summary = "a strategy that looks"

    def __init__(self, observes: Observes) -> None:
        super().__init__()
        self._observes = observes
        self.seen: list[Outcome] = []

    def observes(self, model: LanguageModel) -> Observes:
        return self._observes

    def start(self, target: Target) -> Drafter:
        return _Watcher(self)


class _Watcher(Drafter):
    def __init__(self, strategy: Watching) -> None:
        self._strategy = strategy

    def propose(self, context: Context) -> TokenTree:
        return TokenTree.chain(context.ids[-1], [])

    def observe(self, outcome: Outcome) -> None:
        self._strategy.seen.append(outcome)


NEEDS = [
    Observes(),
    Observes(hidden_layers=(-1,), prefill_hidden="last"),
    Observes(hidden_layers=(0, 2), prefill_hidden="all", prefill_logits=3),
    Observes(hidden_layers=(1,), prefill_logits=100),
]


def controls(**changes: Any) -> Controls:
    return Controls(**{"max_new_tokens": 12, "temperature": 0.0, **changes})


@pytest.mark.parametrize("observes", NEEDS)
def test_a_strategy_chosen_after_the_prompt_was_read_sees_what_it_would_have_seen(
    observes: Observes,
) -> None:
    engine, ids = Engine(tiny_model("llama")), random_ids(20)
    before, after = Watching(observes), Watching(observes)
    usual = Run(engine, before, ids, controls())
    late = Run(engine, HOST.create(PLAIN, {}), ids, controls())
    shown = late.read(union(NEEDS))
    assert shown.hidden[1].shape == (20, WIDTH)
    late.use(after)
    assert list(usual) == list(late)
    for one, other in zip(before.seen, after.seen, strict=True):
        assert one.rows == other.rows
        # As many rows of the head as all ask for are computed: they round otherwise.
        torch.testing.assert_close(one.logits, other.logits)
        assert list(one.best) == list(other.best)
        assert one.hidden.keys() == other.hidden.keys()
        assert all(torch.equal(one.hidden[i], other.hidden[i]) for i in one.hidden)
    assert late.result.stats.seconds_prefill > 0


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "bloom", "mamba"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("name", sorted(HOST.strategies))
def test_every_strategy_decodes_from_a_prompt_that_was_read_before(
    architecture: str, temperature: float, name: str
) -> None:
    model = tiny_model(architecture)
    engine, ids = Engine(model, noisy_draft(model)), random_ids(6) * 3
    strategy = HOST.create(name, {})
    if not strategy.lossless:
        pytest.skip("has another distribution")
    if reason := type(strategy).unavailable(model, engine.draft):
        pytest.skip(reason)
    asked = controls(temperature=temperature, seed=3)
    plain = HOST.create(PLAIN, {})
    run = Run(engine, plain, ids, asked)
    run.read(strategy.observes(model))
    run.use(strategy)
    tokens = [token for step in run for token in step]
    if temperature == 0.0:
        assert tokens == engine.generate(plain, ids, asked).token_ids
    assert len(tokens) == 12


def where(model: LanguageModel, text: str) -> float:
    """The first number of a text's pooled state, read apart."""
    ids = model.encode(text)
    forward = model.prefill(ids, model.plain_cache(), hidden_layers=(LAYER,))
    return pooled(forward.hidden[LAYER])[0]


SHORT, LONG = "w2 w3 w4", "w9 w8 w7 w9 w8 w7"


def decoder(
    names: Sequence[str] = ("token_recycling", "early_exit"), **changes: Any
) -> Decoder:
    """Profiles of two classes, which states tell apart."""
    model = tiny_model("llama")
    model.tokenizer = tiny_tokenizer()
    store, place = MemoryStore(), Decoder(model).environment
    measured = example_profile().measurement
    ends = sorted((where(model, text), text) for text in (SHORT, LONG))
    for prompt_class, strategy in zip(("low", "high"), names, strict=True):
        store.add_profiles(
            [
                example_profile(
                    environment=place,
                    prompt_class=prompt_class,
                    strategy=strategy,
                    params={},
                    measurement=measured,
                )
            ]
        )
    middle = (ends[0][0] + ends[1][0]) / 2
    record = two_classes(0.0, first_axis(middle)).as_json()
    record.update(changes)
    store.put_record("r1", "classifier", record)
    return Decoder(model, store=store)


def test_the_class_is_found_in_the_states_and_the_prompt_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = decoder()
    expected = {
        text: "low" if where(run.model, text) <= where(run.model, other) else "high"
        for text, other in ((SHORT, LONG), (LONG, SHORT))
    }
    read: list[list[int]] = []
    prefill = LanguageModel.prefill

    def counted(self: LanguageModel, tokens: Sequence[int], *a: Any, **k: Any) -> Any:
        if self is run.model:  # and not its lower layers
            read.append(list(tokens))
        return prefill(self, tokens, *a, **k)

    plain = {
        text: run.generate(text, strategy=PLAIN, max_new_tokens=8).token_ids
        for text in expected
    }
    used = {"low": "token_recycling", "high": "early_exit"}
    for text, name in expected.items():
        monkeypatch.setattr(LanguageModel, "prefill", counted)
        read.clear()
        result = run.generate(text, max_new_tokens=8)
        monkeypatch.undo()
        assert (result.choice.prompt_class, result.choice.strategy) == (
            name,
            used[name],
        )
        assert result.token_ids == plain[text]
        assert result.seconds_classifying > 0
        assert result.stats.seconds_prefill > 0
        assert read.count(run.model.encode(text)) == 1
        assert run.classify(text) == name
        stream = run.stream(text, max_new_tokens=8)
        assert stream.choice.prompt_class == name
        assert "".join(stream) == result.text


def test_a_state_unlike_those_tuned_on_is_decoded_plainly_with_the_reason() -> None:
    run = decoder(high=[1e9, 1e-9])
    assert run.classify(SHORT) == UNKNOWN
    with pytest.warns(UserWarning, match="unlike those"):
        found = run.generate(SHORT, max_new_tokens=4)
    assert (found.choice.strategy, found.choice.reason) == (PLAIN, UNLIKE)


@pytest.mark.parametrize(("layer", "width"), [(LAYER, WIDTH // 2), (99, WIDTH)])
def test_states_that_the_model_does_not_have_are_told_at_load(
    layer: int, width: int
) -> None:
    other = StateFeatures(layer, [0.0] * width, [1.0] * width, [[1.0] * width])
    with pytest.warns(UserWarning, match="classes aren't discovered.*run tune again"):
        run = decoder(states=other.as_json())
    assert run.classify(SHORT) is None


def test_the_states_looked_at_are_the_middle_ones() -> None:
    assert states_layer(tiny_model("llama")) == 1
    assert states_layer(tiny_model("gemma3")) == 2


def test_a_model_that_shows_no_states_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    forward = model.model.forward

    def silent(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        output.hidden_states = None
        return output

    monkeypatch.setattr(model.model, "forward", silent)
    cache = model.new_cache()
    with pytest.raises(NoHiddenStatesError, match="llama shows no hidden states"):
        model.prefill([2, 3], cache, hidden_layers=(1,))
    assert len(model.prefill([4], cache).rows) == 1
