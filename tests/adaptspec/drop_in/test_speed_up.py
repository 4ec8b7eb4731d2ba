"""A bound ``generate`` takes transformers' arguments, and can be unbound."""

from __future__ import annotations

import copy
import io
import pickle
import string
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

import adaptspec
from adaptspec.drop_in.speed_up import SpeedUp
from adaptspec.errors import ModelLoadError, UnsupportedControlError
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import random_ids, tiny_module, tiny_tokenizer
from adaptspec_profiles.memory import MemoryStore
from foretold import Foretold, foretelling, tell

PROMPT = torch.tensor([random_ids(12)])
TOKENIZER = tiny_tokenizer()
GenerationConfig: Any = transformers.GenerationConfig


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of 64 bytes, as transformers' stop strings need it."""
    signs = string.ascii_letters + string.digits + ".!"
    inner = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)  # type: ignore[no-untyped-call]


@pytest.fixture
def module() -> Any:
    made = tiny_module("llama")
    made.generation_config.pad_token_id = 0
    made.generation_config.do_sample = False
    return made


@pytest.fixture
def bound(module: Any, monkeypatch: pytest.MonkeyPatch) -> SpeedUp:
    """The module's ``generate``, drafting what the module says itself."""
    tell(monkeypatch, module.generate(PROMPT, max_new_tokens=30), 12)
    decoder = foretelling(module, TOKENIZER)
    return SpeedUp(module, decoder, strategy=Foretold.name).bind()


def own(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What its class's ``generate`` gives."""
    return type(module).generate(module, *args, **kwargs)


def test_one_line_changes_what_decodes_and_another_changes_it_back(module: Any) -> None:
    expected = module.generate(PROMPT, max_new_tokens=20)
    speedup = adaptspec.speed_up(
        module, TOKENIZER, db=MemoryStore(), strategy="prompt_lookup"
    )
    assert module.generate is speedup
    assert torch.equal(module.generate(PROMPT, max_new_tokens=20), expected)
    [result] = speedup.decoder.last
    assert result.token_ids == expected[0, 12:].tolist()
    assert result.choice.strategy == "prompt_lookup"
    speedup.restore()
    assert "generate" not in vars(module)
    assert torch.equal(module.generate(PROMPT, max_new_tokens=20), expected)
    speedup.restore()  # once more does nothing


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "a loaded transformers model is expected, got None"),
        ("gpt2", "got 'gpt2'; load it with AutoModelForCausalLM"),
        (LanguageModel, "got <class '.*LanguageModel'>; load it with"),
        (5, "a loaded transformers model is expected, got 5"),
    ],
)
def test_what_has_no_generate_to_replace_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ModelLoadError, match=said):
        adaptspec.speed_up(given, db=MemoryStore())


def test_a_decoders_model_is_refused_for_its_source(module: Any) -> None:
    with pytest.raises(ModelLoadError, match="pass the module it was made from"):
        adaptspec.speed_up(LanguageModel(module), db=MemoryStore())


def test_a_tokenizers_name_is_refused_at_once(module: Any) -> None:
    with pytest.raises(ModelLoadError, match=r"AutoTokenizer.from_pretrained\('gpt2'"):
        adaptspec.speed_up(module, "gpt2", db=MemoryStore())
    assert "generate" not in vars(module)


def test_parameters_are_those_of_the_strategy_they_were_given_with(module: Any) -> None:
    speedup = adaptspec.speed_up(
        *(module, TOKENIZER),
        db=MemoryStore(),
        strategy="prompt_lookup",
        params={"draft_length": 3},
    )
    module.generate(PROMPT, max_new_tokens=4)
    assert speedup.decoder.last[0].choice.params == {"draft_length": 3}
    module.generate(PROMPT, max_new_tokens=4, strategy="suffix")
    assert speedup.decoder.last[0].choice.params == {}
    with pytest.warns(UserWarning, match="plain decoding"):
        module.generate(PROMPT, max_new_tokens=4, strategy=None)
    speedup.restore()


def test_binding_twice_leaves_one(bound: SpeedUp) -> None:
    module = bound.model
    with adaptspec.speed_up(module, db=MemoryStore(), strategy="suffix") as second:
        assert module.generate is second
        bound.restore()
        assert module.generate is second
        module.generate(PROMPT, max_new_tokens=3)
        assert second.decoder.last[0].choice.strategy == "suffix"
    assert "generate" not in vars(module)


def test_a_generate_of_someone_elses_is_not_replaced(module: Any) -> None:
    module.generate = print
    with pytest.raises(UnsupportedControlError, match=r"del model\.generate"):
        adaptspec.speed_up(module, db=MemoryStore())
    assert module.generate is print


@pytest.mark.parametrize(
    "call",
    [
        lambda generate: generate(PROMPT, GenerationConfig(max_new_tokens=9)),
        lambda generate: generate(inputs=PROMPT, max_new_tokens=9),
        lambda generate: generate(input_ids=PROMPT, max_length=21),
        lambda generate: generate(
            input_ids=PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            generation_config=GenerationConfig(max_new_tokens=9, eos_token_id=5),
        ),
        lambda generate: generate(PROMPT.int(), max_new_tokens=9),
    ],
)
def test_every_way_to_call_it_works(bound: SpeedUp, call: Any) -> None:
    expected = call(lambda *args, **kwargs: own(bound.model, *args, **kwargs))
    output = call(bound.model.generate)
    assert torch.equal(output, expected)
    assert output.dtype == expected.dtype


def test_the_models_own_limits_and_ends_are_in_force(bound: SpeedUp) -> None:
    whole = own(bound.model, PROMPT, max_new_tokens=20)
    config = bound.model.generation_config
    config.max_new_tokens, config.eos_token_id = 15, int(whole[0, 12 + 8])
    output = bound.model.generate(PROMPT)
    assert torch.equal(output, own(bound.model, PROMPT))
    assert output.shape[1] <= 12 + 9


@pytest.mark.parametrize("where", ["argument", "object", "model"])
@pytest.mark.parametrize("known", ["call", "decoder"])
def test_stop_strings_end_the_output_wherever_they_come_from(
    bound: SpeedUp, where: str, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, tokenizer = bound.model, bytes_tokenizer()
    whole = own(module, PROMPT, max_new_tokens=20)
    stop = tokenizer.decode(whole[0, 12 + 6 : 12 + 8])
    given: dict[str, Any] = {"max_new_tokens": 20}
    if where == "argument":
        given["stop_strings"] = [stop]
    elif where == "object":
        given = {
            "generation_config": GenerationConfig(stop_strings=stop, max_new_tokens=20)
        }
    else:
        module.generation_config.stop_strings = [stop]
    expected = own(module, PROMPT, **given, tokenizer=tokenizer)
    monkeypatch.setattr(
        bound.decoder.model, "tokenizer", None if known == "call" else tokenizer
    )
    if known == "call":
        given["tokenizer"] = tokenizer
    output = module.generate(PROMPT, **given)
    assert torch.equal(output, expected)
    assert output.shape[1] < 32
    [result] = bound.decoder.last
    assert result.finish == "stop"
    assert result.token_ids == expected[0, 12:].tolist()
    text = str(tokenizer.decode(result.token_ids, skip_special_tokens=True))
    assert str(stop) in text
    # Without a tokenizer of its own a decoder makes no text.
    assert result.text == ("" if known == "call" else text[: text.index(str(stop))])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_healing", True),
        ("cache_implementation", "paged"),
        ("cache_implementation", "quantized"),
    ],
)
def test_a_stored_field_that_transformers_acts_on_first_is_refused_or_put_off(
    bound: SpeedUp, name: str, value: Any
) -> None:
    module = bound.model
    setattr(module.generation_config, name, value)
    with pytest.raises(UnsupportedControlError, match=f"{name}=.*pass {name}=None"):
        module.generate(PROMPT, max_new_tokens=3, tokenizer=TOKENIZER)
    assert module.generate(PROMPT, max_new_tokens=3, **{name: None}).shape == (1, 15)


@pytest.mark.parametrize("where", ["object", "model"])
def test_stop_strings_that_a_call_puts_off_end_nothing(
    bound: SpeedUp, where: str
) -> None:
    module, tokenizer = bound.model, bytes_tokenizer()
    whole = own(module, PROMPT, max_new_tokens=20)
    stop = tokenizer.decode(whole[0, 12 + 6 : 12 + 8])
    given: dict[str, Any] = {"max_new_tokens": 20}
    if where == "object":
        stopping = GenerationConfig(stop_strings=stop, max_new_tokens=20)
        given = {"generation_config": stopping}
    else:
        module.generation_config.stop_strings = [stop]
    ended = module.generate(PROMPT, **given, tokenizer=tokenizer)
    assert ended.shape[1] < 32
    output = module.generate(PROMPT, **given, tokenizer=tokenizer, stop_strings=None)
    assert torch.equal(output, whole)


def test_a_callers_own_loop_is_left_to_the_caller(bound: SpeedUp) -> None:
    def loop(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return input_ids + 1

    output = bound.model.generate(PROMPT, max_new_tokens=3, custom_generate=loop)
    assert torch.equal(output, PROMPT + 1)


def test_a_bound_model_may_assist_another(bound: SpeedUp) -> None:
    other = tiny_module("llama", seed=3)
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    output = other.generate(PROMPT, **asked, assistant_model=bound.model)
    assert torch.equal(output, other.generate(PROMPT, **asked))
    assert not bound.decoder.last


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.copy, copy.deepcopy, pickled, saved]


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_the_model_can_be_bound_and_leaves_the_other_bound(
    bound: SpeedUp, way: Any
) -> None:
    twin = way(way(bound.model))
    with adaptspec.speed_up(twin, db=MemoryStore(), strategy="suffix") as second:
        assert twin.generate is second
        assert bound.model.generate is bound
        output = twin.generate(PROMPT, max_new_tokens=3)
        assert second.decoder.last[0].choice.strategy == "suffix"
    assert torch.equal(output, own(bound.model, PROMPT, max_new_tokens=3))
    assert "generate" not in vars(twin)
    assert bound.model.generate is bound


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_of_the_model_has_its_own_generate(bound: SpeedUp, way: Any) -> None:
    twin = way(bound.model)
    assert not isinstance(twin.generate, SpeedUp)
    assert twin.generate.__self__ is twin
    assert bound.model.generate is bound
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin.generate(PROMPT, max_new_tokens=3)[0, 12:].any()
    assert bound.model.generate(PROMPT, max_new_tokens=3)[0, 12:].any()


def test_changed_weights_are_followed(bound: SpeedUp) -> None:
    before = bound.model.generate(PROMPT, max_new_tokens=10)
    with torch.no_grad():
        bound.model.lm_head.weight.mul_(-1)
    after = bound.model.generate(PROMPT, max_new_tokens=10)
    assert not torch.equal(after, before)
    assert torch.equal(after, own(bound.model, PROMPT, max_new_tokens=10))


def test_binding_changes_nothing_that_decoding_depends_on(
    bound: SpeedUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        type(bound.decoder.model), "_build", lambda self: pytest.fail("built again")
    )
    bound.model.generate(PROMPT, max_new_tokens=3)
    bound.restore()
    bound.decoder.generate(PROMPT[0].tolist(), max_new_tokens=3, strategy="suffix")


def test_a_text_generation_pipeline_decodes_through_it(bound: SpeedUp) -> None:
    texts = ["w5 w6 w7 w5 w6", "w9 w10"]
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    made = pipeline("text-generation", model=bound.model, tokenizer=TOKENIZER)
    output = made(texts, **arguments)
    assert bound.decoder.last
    bound.restore()
    plain = pipeline("text-generation", model=bound.model, tokenizer=TOKENIZER)
    assert output == plain(texts, **arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_a_compiled_model_is_bound_inside(module: Any) -> None:
    compiled: Any = torch.compile(module)
    expected = module.generate(PROMPT, max_new_tokens=5)
    with adaptspec.speed_up(compiled, db=MemoryStore(), strategy="suffix") as speedup:
        assert torch.equal(compiled.generate(PROMPT, max_new_tokens=5), expected)
        assert speedup.decoder.last
    assert "generate" not in vars(module)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_model_with_adapters_is_bound_outside(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(module, config)
    expected = adapted.generate(input_ids=PROMPT, max_new_tokens=12)
    tell(monkeypatch, expected, 12)
    decoder = foretelling(adapted)
    with SpeedUp(adapted, decoder, strategy=Foretold.name).bind():
        assert torch.equal(adapted.generate(PROMPT, max_new_tokens=12), expected)
        assert sum(s.accepted for s in decoder.last[0].stats.steps) > 3
        with adapted.disable_adapter():
            bare = adapted.generate(input_ids=PROMPT, max_new_tokens=12)
    assert not torch.equal(bare, expected)


@pytest.mark.real_model
@pytest.mark.slow
def test_a_real_model_answers_as_it_does_by_itself(real_model_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model_path)
    model = AutoModelForCausalLM.from_pretrained(real_model_path, dtype=torch.float32)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.padding_side = "left"
    questions = ["Repeat: a b c d e f. a b c d e f.", "What is rain? Say it in a line."]
    inputs = tokenizer(questions, return_tensors="pt", padding=True)
    asked: dict[str, Any] = {**inputs, "max_new_tokens": 24, "do_sample": False}
    expected = model.generate(**asked)
    with adaptspec.speed_up(model, tokenizer, db=MemoryStore(), strategy="suffix"):
        assert torch.equal(model.generate(**asked), expected)
