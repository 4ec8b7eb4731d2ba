"""Controls mean what ``generate`` makes of them, field by field."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor
from transformers.generation import logits_process as hf

from adaptspec.decoding.controls import EXTRA, Controls
from adaptspec.decoding.engine import Engine, Generation
from adaptspec.decoding.generation_fields import FIELDS, ONE_SEQUENCE
from adaptspec.decoding.processing import Processors, steps_of
from adaptspec.errors import InvalidPromptError, UnsupportedControlError
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Context, TokenTree
from adaptspec.testing.fakes import (
    VOCAB,
    FakeClock,
    ScriptedStrategy,
    random_ids,
    tiny_module,
)
from adaptspec.token_ids import Continuation, GrowingTensor

GenerationConfig: Any = transformers.GenerationConfig
CPU = torch.device("cpu")
MODULE = tiny_module("llama")
MODEL = LanguageModel(MODULE)
ids = st.integers(0, VOCAB - 1)


def decode(
    controls: Controls,
    prompt: Sequence[int],
    truth: Sequence[int] = (),
    model: LanguageModel = MODEL,
) -> Generation:
    """Decode, with drafts of four tokens out of ``truth``."""

    def script(context: Context) -> TokenTree:
        done = len(context.ids) - len(prompt)
        return TokenTree.chain(context.ids[-1], list(truth[done : done + 4]))

    return Engine(model).generate(ScriptedStrategy(script), prompt, controls)


def hf_generate(prompt: Sequence[int], module: Any = MODULE, **asked: Any) -> Any:
    """What transformers' own ``generate`` returns, with its scores and logits."""
    return module.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **asked,
    )


def new_tokens(prompt: Sequence[int], **asked: Any) -> list[int]:
    tokens: list[int] = (
        hf_generate(prompt, **asked).sequences[0, len(prompt) :].tolist()
    )
    return tokens


def with_config(**fields: Any) -> LanguageModel:
    """A model whose folder came with these in its ``generation_config``."""
    module = copy.copy(MODULE)
    module.generation_config = GenerationConfig()
    for name, value in fields.items():  # unchecked, as folders hold them
        setattr(module.generation_config, name, value)
    return LanguageModel(module)


# Every control of transformers that chooses tokens, 0 among the ids.
PENALTIES: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.floats(0.5, 2.0),
    "no_repeat_ngram_size": st.integers(0, 3),
    "bad_words_ids": st.lists(
        st.lists(ids, min_size=1, max_size=2), min_size=1, max_size=3
    ),
    "sequence_bias": st.dictionaries(
        st.lists(ids, min_size=1, max_size=2).map(tuple),
        st.floats(-5, 5).map(lambda x: x + 0.01),
        min_size=1,
        max_size=3,
    ),
    "min_length": st.integers(0, 12),
    "min_new_tokens": st.integers(0, 6),
    "forced_bos_token_id": ids,
    "forced_eos_token_id": ids | st.lists(ids, min_size=1, max_size=2),
    "exponential_decay_length_penalty": st.tuples(
        st.integers(0, 4), st.floats(1.01, 1.5)
    ),
    "suppress_tokens": st.lists(ids, max_size=5),
    "begin_suppress_tokens": st.lists(ids, max_size=30),
    "remove_invalid_values": st.booleans(),
    "renormalize_logits": st.booleans(),
}
ENDS = {"eos_token_id": ids | st.lists(ids, min_size=1, max_size=3)}
WARPERS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0.3, 3.0),
    "top_h": st.floats(0.1, 1.0),
    "top_k": st.integers(0, VOCAB),
    "top_p": st.floats(0.1, 1.0),
    "min_p": st.floats(0.01, 0.5),
    "typical_p": st.floats(0.2, 1.0),
    "epsilon_cutoff": st.floats(0.0, 0.05),
    "eta_cutoff": st.floats(0.0, 0.05),
}
prompts = st.lists(ids, min_size=1, max_size=8)


def sensible(asked: dict[str, Any]) -> dict[str, Any]:
    """Without suppressing a token that is forced, which ``generate`` refuses.

    Nor with a penalty on its length, whose NaN there ends ``generate``.
    """
    forced = [asked.get("forced_bos_token_id"), asked.get("forced_eos_token_id")]
    if forced != [None, None]:
        asked.pop("exponential_decay_length_penalty", None)
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if name in asked:
            flat = {x for f in forced for x in (f if isinstance(f, list) else [f])}
            asked[name] = [token for token in asked[name] if token not in flat]
    return asked


penalties = st.fixed_dictionaries(ENDS, optional=PENALTIES).map(sensible)


@st.composite
def sampled(draw: st.DrawFn) -> dict[str, Any]:
    return {
        **draw(penalties),
        **draw(st.fixed_dictionaries({}, optional=WARPERS)),
        "do_sample": True,
    }


def test_the_table_has_every_field_of_the_class_and_no_invented_one() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= set(FIELDS)
    # Every field that `generate` may read in some version has been in the class.
    assert set(FIELDS) - fields <= {
        *("use_mtp", "max_cache_len", "assistant_ensemble_weight", "speculation_type"),
        *("continuous_batching_config", "_from_model_config"),
    }
    own = {"max_new_tokens", "max_length", "max_time", "temperature", "top_k", "top_p"}
    own |= {"min_p", "repetition_penalty", "stop_strings", "do_sample", "eos_token_id"}
    honoured = {name for name, field in FIELDS.items() if field.effect == "honoured"}
    assert honoured == own | set(EXTRA)
    defaults = GenerationConfig._get_default_generation_params()
    for name, value in defaults.items():
        if FIELDS[name].effect == "refused":
            assert value in FIELDS[name].neutral, name


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(sampled() | penalties, prompts, st.integers(1, 9), st.data())
def test_processors_are_those_of_generate_in_its_order(
    asked: dict[str, Any], prompt: list[int], limit: int, data: st.DataObject
) -> None:
    config, _ = MODULE._prepare_generation_config(
        None, max_new_tokens=limit, **copy.deepcopy(asked)
    )
    MODULE._prepare_special_tokens(config, device=CPU)
    config = MODULE._prepare_generated_length(
        config, False, "min_length" not in asked, "input_ids", len(prompt), None
    )
    theirs = MODULE._get_logits_processor(
        config, len(prompt), torch.tensor([prompt]), device="cpu"
    )
    controls = Controls.for_model(MODEL, max_new_tokens=limit, **copy.deepcopy(asked))
    ours = steps_of(controls, len(prompt), CPU)
    assert [type(step.processor) for step in ours] == [type(p) for p in theirs]
    processors = Processors(controls, len(prompt), CPU)
    assert processors.greedy == (not asked.get("do_sample"))
    tokens: list[int] = []
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for token in data.draw(st.lists(ids, min_size=limit, max_size=limit)):
        logits = 3 * torch.randn(VOCAB, generator=generator)
        past = torch.tensor([prompt + tokens])
        expected = theirs(past, logits[None].clone())[0]
        assert torch.equal(processors(Continuation(prompt, tokens), logits), expected)
        assert torch.equal(processors(prompt + tokens, logits), expected)
        tokens.append(token)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(penalties, prompts)
def test_greedy_output_is_generates_under_any_controls(
    asked: dict[str, Any], prompt: list[int]
) -> None:
    expected = new_tokens(
        prompt, max_new_tokens=9, do_sample=False, **copy.deepcopy(asked)
    )
    controls = Controls.for_model(
        MODEL, max_new_tokens=9, do_sample=False, **copy.deepcopy(asked)
    )
    assert decode(controls, prompt).token_ids == expected
    assert decode(controls, prompt, expected).token_ids == expected


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(sampled(), prompts)
def test_sampled_scores_are_those_that_generate_samples_from(
    asked: dict[str, Any], prompt: list[int]
) -> None:
    torch.manual_seed(1)
    done = hf_generate(prompt, max_new_tokens=5, **copy.deepcopy(asked))
    controls = Controls.for_model(MODEL, max_new_tokens=5, **copy.deepcopy(asked))
    processors = Processors(controls, len(prompt), CPU)
    whole = done.sequences[0].tolist()
    for step, (scores, logits) in enumerate(zip(done.scores, done.logits, strict=True)):
        found = processors(whole[: len(prompt) + step], logits[0])
        assert torch.equal(found, scores[0])


@pytest.mark.parametrize("place", range(3))
def test_a_processor_of_the_callers_stands_in_for_one_of_ours(place: int) -> None:
    own = hf.NoRepeatNGramLogitsProcessor(3)
    given = [
        hf.SuppressTokensLogitsProcessor([4]),
        own,
        hf.InfNanRemoveLogitsProcessor(),
    ]
    given = given[place:] + given[:place]
    asked = {
        "no_repeat_ngram_size": 1,
        "temperature": 0.5,
        "sequence_bias": {(3,): 1.0},
    }
    config, _ = MODULE._prepare_generation_config(None, do_sample=True, **asked)
    MODULE._prepare_special_tokens(config, device=CPU)
    theirs = MODULE._get_logits_processor(
        config, 5, torch.tensor([[5] * 5]), None, hf.LogitsProcessorList(given), "cpu"
    )
    controls = Controls.for_model(MODEL, logits_processor=given, **asked)
    ours = [step.processor for step in steps_of(controls, 5, CPU)]
    assert [type(p) for p in ours] == [type(p) for p in theirs]
    assert own in ours


@pytest.mark.parametrize("id_zero", ["forced_eos_token_id", "forced_bos_token_id"])
def test_id_zero_is_an_id(id_zero: str) -> None:
    controls = Controls.for_model(
        MODEL, max_new_tokens=4, temperature=0, **{id_zero: 0}
    )
    expected = new_tokens([9], max_new_tokens=4, do_sample=False, **{id_zero: 0})
    assert 0 in expected
    assert decode(controls, [9]).token_ids == expected


def test_do_sample_false_is_greedy_whatever_the_temperature() -> None:
    greedy = Controls.for_model(MODEL, do_sample=False, temperature=0.9)
    assert greedy.temperature == 0
    assert Controls.for_model(MODEL, temperature=0.9).temperature == 0.9
    assert Controls.for_model(MODEL, do_sample=True).temperature == 1
    stored = with_config(do_sample=False, temperature=0.4)
    assert Controls.for_model(stored).temperature == 0
    assert Controls.for_model(stored, temperature=0.9).temperature == 0.9
    assert Controls.for_model(stored, do_sample=True).temperature == 0.4
    with pytest.raises(UnsupportedControlError, match="temperature above 0"):
        Controls.for_model(MODEL, do_sample=True, temperature=0)


def test_top_k_is_generates_where_nothing_sets_it_and_can_be_switched_off() -> None:
    assert Controls.for_model(MODEL, temperature=1.0).top_k == 50
    assert Controls.for_model(with_config(top_k=7), temperature=1.0).top_k == 7
    for off in (0, None):
        assert Controls.for_model(MODEL, temperature=1.0, top_k=off).top_k == 0


@pytest.mark.slow
def test_the_length_is_generates() -> None:
    prompt = random_ids(6)
    for asked in (
        {"max_length": 11},
        {"max_length": 11, "max_new_tokens": 3},
        {"max_length": 11, "forced_eos_token_id": 0},
    ):
        expected = new_tokens(prompt, do_sample=False, **asked)
        for model, told in ((MODEL, asked), (with_config(**asked), {})):
            controls = Controls.for_model(model, **told)
            done = decode(controls, prompt, expected, model)
            assert (done.token_ids, done.finish) == (expected, "length")
    with pytest.raises(InvalidPromptError, match=r"max_length=6.*prompt of 6"):
        decode(Controls.for_model(MODEL, max_length=6), prompt)
    assert Controls(max_length=9).with_limit(4).room(6) == 4


def test_decoding_stops_when_the_time_is_over_with_what_was_accepted() -> None:
    prompt = random_ids(6)
    whole = decode(Controls(max_new_tokens=30), prompt).token_ids
    engine = Engine(MODEL, clock=FakeClock(tick=1.0))
    silent = ScriptedStrategy(lambda context: TokenTree.root_only(context.ids[-1]))
    done = engine.generate(silent, prompt, Controls(max_new_tokens=30, max_time=20.0))
    assert done.finish == "time"
    assert 1 <= len(done.token_ids) < 30
    assert done.token_ids == whole[: len(done.token_ids)]
    at_once = engine.generate(silent, prompt, Controls(max_new_tokens=30, max_time=0))
    assert len(at_once.token_ids) == 1
    assert Controls.for_model(with_config(max_time=2.5)).max_time == 2.5
    assert Controls.for_model(with_config(max_time=2.5), max_time=None).max_time is None


REFUSED = {
    "num_beams": 4,
    "num_return_sequences": 2,
    "constraints": [1],
    "force_words_ids": [[3]],
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "guidance_scale": 1.5,
    "token_healing": True,
    "watermarking_config": {"bias": 2.0},
    "encoder_repetition_penalty": 1.3,
    "encoder_no_repeat_ngram_size": 2,
    "is_assistant": True,
    "cache_implementation": "quantized",
}


@pytest.mark.slow
def test_every_refusal_names_a_way_out_that_works() -> None:
    refused = {name for name, field in FIELDS.items() if field.effect == "refused"}
    assert refused == set(REFUSED)
    for name, value in REFUSED.items():
        for model, told in (
            (MODEL, {name: value}),
            (with_config(**{name: value}), {}),
        ):
            with pytest.raises(UnsupportedControlError, match=name) as caught:
                Controls.for_model(model, **told)
            way = str(caught.value).split(f"pass {name}=")[1].split(" (")[0]
            off = json.loads({"None": "null", "False": "false"}.get(way, way))
            assert Controls.for_model(model, **{name: off}).temperature == 0
    everything = with_config(**REFUSED, max_time=1.0)
    assert Controls.for_model(everything, **ONE_SEQUENCE).max_time is None


@pytest.mark.slow
def test_fields_without_effect_are_taken_and_change_nothing() -> None:
    plain = Controls.for_model(MODEL)
    for name, field in FIELDS.items():
        if field.effect == "none" and not name.startswith("_"):
            assert Controls.for_model(MODEL, **{name: 3}) == plain, name
            assert Controls.for_model(with_config(**{name: 3})) == plain, name


def test_fields_of_a_models_own_are_no_business_of_ours() -> None:
    model = with_config(chat_format="chatml", max_window_size=6144, seed=3)
    assert Controls.for_model(model) == Controls.for_model(MODEL)
    with pytest.raises(UnsupportedControlError, match="no control chat_format"):
        Controls.for_model(model, chat_format="raw")


def test_a_field_that_a_later_transformers_adds_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from adaptspec.decoding import controls

    monkeypatch.setattr(controls, "foreign_fields", lambda: frozenset({"new_penalty"}))
    model = with_config(new_penalty=1.5)
    with pytest.raises(
        UnsupportedControlError, match=r"new_penalty=1.5.*new_penalty=N"
    ):
        Controls.for_model(model)


def test_a_generation_config_goes_before_the_models_and_after_arguments() -> None:
    model = with_config(temperature=0.3, top_k=3, max_new_tokens=7, eos_token_id=[4])
    config = GenerationConfig(
        do_sample=True, top_k=5, eos_token_id=6, suppress_tokens=[0]
    )
    found = Controls.for_model(model, generation_config=config, max_new_tokens=9)
    assert (found.temperature, found.top_k, found.max_new_tokens) == (0.3, 5, 9)
    assert (found.eos_token_ids, found.extra["suppress_tokens"]) == ((6,), [0])
    greedy = GenerationConfig(do_sample=False)
    one = Controls.for_model(MODEL, generation_config=greedy, temperature=0.5)
    assert one.temperature == 0
    with pytest.raises(UnsupportedControlError, match="GenerationConfig, got dict"):
        Controls.for_model(MODEL, generation_config={"top_k": 3})
    beams = GenerationConfig(num_beams=3)
    with pytest.raises(UnsupportedControlError, match="num_beams"):
        Controls.for_model(MODEL, generation_config=beams)


def test_none_switches_off_what_the_model_has_stored() -> None:
    model = with_config(
        **{"suppress_tokens": [4], "repetition_penalty": 1.4, "min_p": 0.2},
        **{"eos_token_id": 5, "max_length": 20},
    )
    off = dict.fromkeys(
        ("suppress_tokens", "repetition_penalty", "min_p", "eos_token_id", "max_length")
    )
    found = Controls.for_model(model, **off)
    assert found == Controls(top_k=50)
    kept = Controls.for_model(model, temperature=None, max_new_tokens=None)
    assert kept == Controls.for_model(model)
    assert kept.max_length == 20


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"temperature": float("nan")}, "temperature must be >= 0"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ({"top_k": -1}, "top_k"),
        ({"logits_processor": 7}, "logits_processor must be a list"),
        ({"logits_processor": [7]}, "logits_processor must be a list"),
        ({"bad_words_ids": [3]}, "bad_words_ids"),
        ({"suppress_tokens": 3}, "suppress_tokens"),
        (
            {"suppress_tokens": [4, 0], "forced_eos_token_id": 0},
            "forced_eos_token_id=0",
        ),
        ({"no_repeat_ngram_size": "x"}, "wrong type"),
        ({"top_h": 4.0, "temperature": 1.0}, "top_h"),
        ({"sequence_bias": {(900,): 1.0}}, "sequence_bias"),
        ({"forced_bos_token_id": 900}, "forced_bos_token_id"),
        (
            {"exponential_decay_length_penalty": (1, 1.2), "eos_token_id": None},
            "eos_token_id",
        ),
        ({"exponential_decay_length_penalty": (1,)}, "must be a pair"),
        ({"exponential_decay_length_penalty": 5}, "must be a pair"),
        ({"eos_token_id": "x"}, "eos_token_id must be the id of a token"),
        ({"eos_token_id": [[1]]}, "eos_token_id must be the id of a token"),
        ({"eos_token_id": 1.5}, r"eos_token_id must be .*got 1\.5"),
        ({"eos_token_id": True}, "eos_token_id must be the id of a token"),
        ({"eos_token_ids": "ab"}, "eos_token_ids must be the id of a token"),
        ({"stop_strings": 5}, "stop_strings must be a text or a list of texts"),
        ({"stop_strings": [5]}, "stop_strings must be a text or a list of texts"),
        ({"stop_strings": b"x"}, "stop_strings must be a text or a list of texts"),
        ({"do_sample": "no"}, "do_sample must be True or False, got 'no'"),
        ({"logits_processor": [lambda ids, scores: None]}, "returned NoneType"),
        ({"logits_processor": [lambda ids, scores: scores[0]]}, r"shape \[64\]"),
    ],
)
def test_a_value_of_no_use_is_one_line(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedControlError, match=named) as caught:
        decode(Controls.for_model(MODEL, **asked), [9])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ids",
    [3, [3], (3,), torch.tensor(3), torch.tensor([3]), numpy.int64(3), numpy.array(3)],
)
def test_ends_of_sequence_come_in_any_form(ids: Any) -> None:
    assert Controls.for_model(MODEL, eos_token_id=ids).eos_token_ids == (3,)


class Counted(list[int]):
    """Counts the ids that are read out of it."""

    read = 0

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        self.read += len(found) if isinstance(at, slice) else 1
        return found

    def __iter__(self) -> Any:
        self.read += len(self)
        return super().__iter__()


def test_a_processor_sees_long_ids_without_reading_them_again() -> None:
    committed = Counted(random_ids(5000))
    processors = Processors(Controls(repetition_penalty=1.2), 5000, CPU)
    processors(Continuation(committed, ()), torch.zeros(VOCAB))
    first = committed.read
    for step in range(50):
        processors(Continuation(committed, [3, 4]), torch.zeros(VOCAB))
        committed.append(step % VOCAB)
    assert committed.read <= first + 50


@pytest.mark.slow
@given(st.lists(ids, min_size=1, max_size=40), st.lists(ids, max_size=3), st.data())
def test_growing_ids_are_the_ids(
    start: list[int], before: list[int], data: st.DataObject
) -> None:
    growing, committed = GrowingTensor(CPU, before), list(start)
    for _ in range(6):
        tail = data.draw(st.lists(ids, max_size=4))
        view = Continuation(committed, tail)
        assert list(view) == [*committed, *tail]
        assert (len(view), view[-1]) == (
            len(committed) + len(tail),
            [*committed, *tail][-1],
        )
        assert view[2:-1] == [*committed, *tail][2:-1]
        found = growing.of(view)
        assert found.tolist() == [[*before, *committed, *tail]]
        assert growing.of([*committed]).tolist() == [[*before, *committed]]
        assert found.dtype == torch.long
        committed += tail[: data.draw(st.integers(0, len(tail)))]


class Remembering(LogitsProcessor):
    """Keeps the ids it was given, as tensors."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.seen.append(input_ids)
        return scores


def test_ids_that_a_processor_keeps_stay_what_they_were() -> None:
    prompt = random_ids(6)
    truth = decode(Controls(max_new_tokens=20), prompt).token_ids
    keeper = Remembering()
    decode(Controls(max_new_tokens=20, logits_processor=[keeper]), prompt, truth)
    whole = [*prompt, *truth]
    assert [seen.tolist() for seen in keeper.seen] == [
        [whole[: len(prompt) + step]] for step in range(20)
    ]
