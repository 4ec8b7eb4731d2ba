"""The face of the library, on tiny models."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import adaptspec
import adaptspec_plugins
from adaptspec.decoder import Decoder, PlainDecodingWarning
from adaptspec.environment import environment_of
from adaptspec.errors import (
    AdaptSpecError,
    HeadsLoadError,
    InvalidParamsError,
    InvalidPromptError,
    ModelLoadError,
    ProfileStoreError,
    UnknownStrategyError,
    UnsupportedControlError,
)
from adaptspec.heads.checkpoints import write_heads
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.profile import PLAIN
from adaptspec.testing.fakes import random_ids, tiny_module, tiny_tokenizer
from adaptspec.testing.heads import attach_tiny_heads, tiny_heads
from adaptspec.testing.stores import example_profile
from adaptspec_profiles.memory import MemoryStore
from decided import keep

PROMPT = random_ids(12)


@pytest.fixture
def module() -> Any:
    return tiny_module("llama")


@pytest.fixture
def decoder(module: Any) -> Decoder:
    return adaptspec.load(module, db=MemoryStore(), tokenizer=tiny_tokenizer())


def test_nothing_profiled_means_plain_decoding_said_once(decoder: Decoder) -> None:
    with pytest.warns(PlainDecodingWarning, match="nothing is profiled"):
        result = decoder.generate(PROMPT, max_new_tokens=5)
    assert result.choice.strategy == PLAIN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.generate(PROMPT, max_new_tokens=5)


def test_one_run_may_be_pinned_by_name(module: Any) -> None:
    model = LanguageModel(module, tiny_tokenizer())
    store = MemoryStore()
    here = environment_of(model, None)
    for number, run in enumerate(("old", "new")):
        profile = example_profile(
            environment=here,
            run=run,
            params={"draft_length": 3 + number},
            created=example_profile().created + timedelta(days=number),
        )
        keep(store, [profile])
    lengths = [
        adaptspec.load(model, db=store, run=run).choose("chat").params["draft_length"]
        for run in (None, "old", "new")
    ]
    assert lengths == [4, 3, 4]
    with pytest.raises(AdaptSpecError, match="run 'gone' decided nothing"):
        adaptspec.load(model, db=store, run="gone").choose("chat")


def test_the_profiled_winner_is_used_and_the_reason_told(module: Any) -> None:
    model = LanguageModel(module, tiny_tokenizer())
    store = MemoryStore()
    keep(
        store,
        [
            example_profile(
                environment=environment_of(model, None),
                params={"draft_length": 5},
            )
        ],
    )
    decoder = adaptspec.load(model, db=store)
    result = decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=12)
    assert result.choice.strategy == "prompt_lookup"
    assert result.choice.params == {"draft_length": 5}
    assert "1.50x" in result.choice.reason
    plain = decoder.generate(PROMPT, strategy=PLAIN, max_new_tokens=12)
    assert result.token_ids == plain.token_ids


def test_a_profiled_strategy_that_cant_run_here_falls_back_and_says_so(
    module: Any,
) -> None:
    model = LanguageModel(module)
    store = MemoryStore()
    here = environment_of(model, None)
    reasons = {
        "draft_model": "draft model",
        "gone": "no strategy",
        "early_exit": "early_exit is left out: no strategy 'early_exit'",
    }
    for strategy, said in reasons.items():
        keep(store, [example_profile(environment=here, strategy=strategy, params={})])
        choice = adaptspec.load(model, db=store).choose("chat")
        assert choice.strategy == PLAIN
        assert said in choice.reason
        store.delete_run("r1")


def test_an_override_needs_a_known_strategy_and_valid_parameters(
    decoder: Decoder,
) -> None:
    ids: dict[str, Any] = {"prompt": PROMPT, "max_new_tokens": 3}
    with pytest.raises(UnknownStrategyError, match=r"'guess'; known: .*prompt_lookup"):
        decoder.generate(**ids, strategy="guess")
    with pytest.raises(InvalidParamsError, match="draft_length='many'"):
        decoder.generate(
            **ids, strategy="prompt_lookup", params={"draft_length": "many"}
        )
    with pytest.raises(InvalidParamsError, match="no parameter 'kk'"):
        decoder.generate(**ids, strategy="prompt_lookup", params={"kk": 1})
    with pytest.raises(AdaptSpecError, match="strategy="):
        decoder.generate(**ids, params={"draft_length": 3})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_pieces_join_to_the_generated_text(
    decoder: Decoder, temperature: float
) -> None:
    asked: dict[str, Any] = {
        "strategy": "prompt_lookup",
        "temperature": temperature,
        "max_new_tokens": 25,
        "seed": 4,
    }
    text = decoder.generate(PROMPT, **asked).text
    pieces = list(decoder.stream(PROMPT, **asked))
    assert text
    assert "".join(pieces) == text
    assert len(pieces) > 5


def test_the_callers_model_is_never_changed(module: Any) -> None:
    kinds = [type(m) for m in module.modules()]
    pointers = [p.data_ptr() for p in module.parameters()]
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    config = copy.deepcopy(module.config.to_dict())
    decoder = adaptspec.load(module, db=MemoryStore())
    decoder.generate(PROMPT, strategy="prompt_lookup", max_new_tokens=8)
    assert [type(m) for m in module.modules()] == kinds
    assert [p.data_ptr() for p in module.parameters()] == pointers
    assert all(weights[k].equal(v) for k, v in module.state_dict().items())
    assert module.config.to_dict() == config
    assert module.config._attn_implementation == "sdpa"


def test_a_model_spread_over_devices_is_used_as_it_is(module: Any) -> None:
    module.hf_device_map = {"model.layers.0": 0, "lm_head": "cpu"}
    module.train()
    kinds = [type(m) for m in module.modules()]
    model = LanguageModel(module)
    assert model.model is module
    assert module.training
    assert [type(m) for m in module.modules()] == kinds


def test_prompts_that_cant_be_read_are_refused_by_reason(module: Any) -> None:
    bare = adaptspec.load(module, db=MemoryStore())
    with pytest.raises(InvalidPromptError, match="tokenizer"):
        bare.generate("hello", strategy=PLAIN)
    with pytest.raises(InvalidPromptError, match=r"0\.\.63, got 64"):
        bare.generate([3, 64], strategy=PLAIN)
    named = adaptspec.load(module, db=MemoryStore(), tokenizer=tiny_tokenizer())
    named.model.tokenizer.chat_template = None
    with pytest.raises(InvalidPromptError, match="chat template"):
        named.generate([{"role": "user", "content": "x"}], strategy=PLAIN)


def test_a_stop_string_ends_the_output_with_its_token(decoder: Decoder) -> None:
    whole = decoder.generate(PROMPT, strategy=PLAIN, max_new_tokens=20)
    stop = decoder.model.decode(whole.token_ids[6:8], skip_special=False)
    for strategy in (PLAIN, "prompt_lookup"):
        cut = decoder.generate(
            PROMPT, strategy=strategy, max_new_tokens=20, stop_strings=[stop]
        )
        assert cut.finish == "stop"
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        text = decoder.model.decode(cut.token_ids, skip_special=False)
        assert stop in text
        before = decoder.model.decode(cut.token_ids[:-1], skip_special=False)
        assert stop not in before


def test_an_empty_stop_string_is_refused(decoder: Decoder) -> None:
    for stops in ("", ["w5", ""]):
        with pytest.raises(UnsupportedControlError, match="at least one character"):
            decoder.generate(PROMPT, strategy=PLAIN, stop_strings=stops)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt_class": ["a"]}, r"prompt_class must be a name.*got \['a'\]"),
        ({"prompt_class": 5}, "prompt_class must be a name"),
        ({"strategy": ["a"]}, "strategy must be a name"),
        ({"strategy": PLAIN, "params": [1]}, r"params must be a mapping.*got \[1\]"),
        ({"strategy": PLAIN, "params": "x"}, "params must be a mapping"),
        ({"template_arguments": [1]}, "template_arguments must be a mapping"),
        ({"tools": 5}, "tools must be a list"),
    ],
)
def test_an_argument_of_the_wrong_type_is_one_line(
    decoder: Decoder, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdaptSpecError, match=said) as refused:
        decoder.generate("w5 w6", max_new_tokens=2, **asked)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"threads": 0}, "threads must be a whole number above 0, got 0"),
        ({"threads": "2"}, "threads must be a whole number above 0, got '2'"),
        ({"db": 5}, "db must be a path, an SQLAlchemy URL or an open store, got 5"),
        ({"heads": 5}, "heads must be folders, got 5"),
        ({"heads": [5]}, r"heads must be folders, got \[5\]"),
        ({"tokenizer": "gpt2"}, r"got 'gpt2'; pass AutoTokenizer.*\('gpt2'\)"),
        ({"tokenizer": 5}, "tokenizer must be a loaded one, got 5"),
        ({"tokenizer": PreTrainedTokenizerFast}, "tokenizer must be a loaded one"),
        ({"dtype": "bfloat16"}, r"\(float32\), got 'bfloat16'; call its to\(torch\.b"),
        ({"dtype": torch.float16}, r"\(float32\), got 'float16'; call its to\(torch\."),
        ({"dtype": "float17"}, "dtype must be auto, float32.*got 'float17'"),
        ({"device": "meta"}, "device must be one that is here"),
        ({"adapt": "no"}, "adapt must be True, False or a Learning, got 'no'"),
        ({"adapt": None}, "adapt must be True, False or a Learning, got None"),
    ],
)
def test_load_refuses_what_it_would_stumble_over_or_ignore(
    module: Any, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdaptSpecError, match=said) as refused:
        adaptspec.load(module, **{"db": MemoryStore(), **asked})
    assert "\n" not in str(refused.value)


def test_a_loaded_model_may_be_given_with_what_it_has(module: Any) -> None:
    for dtype in ("float32", torch.float32, "auto"):
        asked: dict[str, Any] = {"dtype": dtype, "device": "cpu"}
        model = adaptspec.load(module, db=MemoryStore(), **asked).model
        adaptspec.load(model, db=MemoryStore(), **asked)
    with pytest.raises(ModelLoadError, match="dtype must be that of"):
        adaptspec.load(model, db=MemoryStore(), dtype="float16")
    with pytest.raises(ModelLoadError, match="pass it to LanguageModel"):
        adaptspec.load(model, db=MemoryStore(), tokenizer=tiny_tokenizer())
    elsewhere = copy.copy(model)
    elsewhere.device = torch.device("cuda", 1)
    with pytest.raises(ModelLoadError, match=r"loaded already \(cuda:1\), got 'cpu'"):
        adaptspec.load(elsewhere, db=MemoryStore(), device="cpu")


def test_what_isnt_a_model_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="there is no folder"):
        adaptspec.load("./no/such/folder", db=MemoryStore())


def test_digests_tell_models_apart_and_know_them_again(module: Any) -> None:
    one, again = LanguageModel(module), LanguageModel(copy.deepcopy(module))
    other = LanguageModel(tiny_module("llama", seed=1))
    assert one.digest == again.digest != other.digest
    environment = environment_of(one, other)
    assert environment.draft == other.digest
    assert environment.key() == replace(environment, versions={}).key()


def test_without_a_store_plugin_nothing_is_profiled_and_strategies_can_be_asked_for(
    module: Any,
) -> None:
    host = Host({"bundled": adaptspec_plugins})
    decoder = adaptspec.load(module, tokenizer=tiny_tokenizer(), host=host)
    asked = decoder.generate(PROMPT, strategy="prompt_lookup", max_new_tokens=5)
    assert asked.choice.strategy == "prompt_lookup"
    with pytest.warns(PlainDecodingWarning, match="no working plugin opens one"):
        chosen = decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=5)
    assert chosen.choice.strategy == PLAIN
    assert chosen.token_ids == asked.token_ids
    with pytest.raises(ProfileStoreError, match=r"no plugin opens.*mine\.db"):
        adaptspec.load(module, db="mine.db", host=host)


def headed(module: Any) -> LanguageModel:
    return attach_tiny_heads(LanguageModel(module, tiny_tokenizer()))


def test_a_lossy_winner_is_used_only_where_that_is_allowed(module: Any) -> None:
    model = headed(module)
    here = environment_of(model, None)
    lossy = example_profile(
        environment=here, strategy="medusa_typical", params={}, lossless=False
    )
    store = MemoryStore()
    keep(store, [lossy])
    decoder = adaptspec.load(model, db=store)
    with pytest.warns(PlainDecodingWarning):
        result = decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=4)
    assert (result.choice.strategy, result.choice.lossless) == (PLAIN, True)
    decoder = adaptspec.load(model, db=store, allow_lossy=True)
    result = decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=4)
    assert result.choice.strategy == "medusa_typical"
    assert not result.choice.lossless


def test_a_lossy_strategy_asked_for_by_name_is_used_and_labelled(module: Any) -> None:
    decoder = adaptspec.load(headed(module), db=MemoryStore())
    for name, lossless in (("medusa_typical", False), ("medusa", True)):
        choice = decoder.generate(PROMPT, strategy=name, max_new_tokens=4).choice
        assert (choice.strategy, choice.lossless) == (name, lossless)


def test_heads_are_read_from_folders_and_part_of_the_environment(
    module: Any, tmp_path: Path
) -> None:
    model = LanguageModel(module, tiny_tokenizer())
    write_heads(
        tmp_path / "mine",
        tiny_heads(model),
        base_model="tiny",
        vocab_size=model.vocab_size,
        paths=None,
        ranks=None,
        record={},
    )
    bare = adaptspec.load(module, db=MemoryStore(), tokenizer=tiny_tokenizer())
    decoder = adaptspec.load(
        module, db=MemoryStore(), tokenizer=tiny_tokenizer(), heads=tmp_path / "mine"
    )
    assert decoder.environment.heads_name == "mine"
    assert decoder.environment.heads is not None
    assert decoder.environment.key() != bare.environment.key()
    assert decoder.environment.place() == bare.environment.place()
    result = decoder.generate(PROMPT, strategy="medusa", max_new_tokens=9)
    plain = bare.generate(PROMPT, strategy=PLAIN, max_new_tokens=9)
    assert result.token_ids == plain.token_ids
    with pytest.raises(HeadsLoadError, match="no folder"):
        adaptspec.load(module, db=MemoryStore(), heads=tmp_path / "gone")


def with_a_draft(model: LanguageModel, store: MemoryStore, ratio: float = 1.5) -> None:
    """Tuned with a draft model: it is the fastest, prompt lookup comes next.

    Args:
        ratio: Of prompt lookup.
    """
    place = replace(environment_of(model, None), draft="d9", draft_name="small")
    measured = example_profile().measurement
    first = example_profile(
        environment=place,
        strategy="draft_model",
        params={},
        measurement=replace(measured, ratio=2.0),
    )
    second = replace(
        first,
        strategy="prompt_lookup",
        params={"draft_length": 3},
        measurement=replace(measured, ratio=ratio, interval_low=ratio - 0.2),
    )
    keep(store, [first, second])


def test_without_the_draft_model_the_best_that_needs_none_serves(module: Any) -> None:
    model, store = LanguageModel(module, tiny_tokenizer()), MemoryStore()
    with_a_draft(model, store)
    decoder = adaptspec.load(model, db=store)
    choice = decoder.choose("chat")
    assert choice.strategy == "prompt_lookup"
    assert "measured 1.50x" in choice.reason
    assert "draft_model was 2.00x with the draft model small" in choice.reason
    # What it took is added to the profile that was measured with the draft model.
    decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=9)
    decoder.save()
    (use,) = store.uses()
    profile = store.profile(use.profile)
    assert profile is not None
    assert profile.strategy == "prompt_lookup"


def test_where_only_the_draft_model_is_faster_it_says_what_to_pass(module: Any) -> None:
    model, store = LanguageModel(module, tiny_tokenizer()), MemoryStore()
    with_a_draft(model, store, ratio=0.9)
    choice = adaptspec.load(model, db=store).choose("chat")
    assert choice.strategy == PLAIN
    assert "the draft model small (draft_model=, --draft-model)" in choice.reason


def test_another_dtype_is_told_with_what_to_pass(module: Any) -> None:
    model, store = LanguageModel(module, tiny_tokenizer()), MemoryStore()
    place = replace(environment_of(model, None), dtype="bfloat16", model="other")
    keep(store, [example_profile(environment=place)])
    choice = adaptspec.load(model, db=store).choose("chat")
    assert choice.strategy == PLAIN
    assert "load with dtype='bfloat16', or run tune here" in choice.reason


def test_threads_are_set_before_the_environment_is_read(module: Any) -> None:
    before = torch.get_num_threads()
    try:
        decoder = adaptspec.load(module, db=MemoryStore(), threads=before + 1)
        assert decoder.environment.threads == before + 1
    finally:
        torch.set_num_threads(before)


def test_without_a_model_the_embedded_one_is_loaded(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module.save_pretrained(tmp_path)
    monkeypatch.setattr(
        "adaptspec.decoder.default_model_path", lambda progress: tmp_path
    )
    decoder = adaptspec.load(db=MemoryStore(), tokenizer=tiny_tokenizer())
    assert decoder.model.digest == LanguageModel(module).digest
