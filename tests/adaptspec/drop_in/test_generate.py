"""Output, scores and the generator are those of transformers' own ``generate``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

import adaptspec.drop_in.arguments as checks
from adaptspec.decoding.generation_fields import DROP_IN, FIELDS
from adaptspec.drop_in.arguments import check_configuration
from adaptspec.drop_in.speed_up import SpeedUp
from adaptspec.errors import InvalidPromptError, UnsupportedControlError
from adaptspec.testing.fakes import ARCHITECTURES, VOCAB, random_ids, tiny_module
from adaptspec.testing.strategies import Grammar
from foretold import Foretold, foretelling, foretold, tell

GenerationConfig: Any = transformers.GenerationConfig
PAD = 0
ONE = torch.tensor([random_ids(12)])
# Rows of three lengths, padded on the left.
LENGTHS = (12, 7, 9)
BATCH = torch.tensor([[PAD] * (12 - n) + random_ids(n, seed=n) for n in LENGTHS])
MASK = torch.tensor([[0] * (12 - n) + [1] * n for n in LENGTHS])
# Of each row, one comes early.
EARLY = 20


@functools.cache
def fast(architecture: str = "llama") -> SpeedUp:
    module = tiny_module(architecture)
    module.generation_config.pad_token_id = PAD
    return foretold(module)


def plain(speedup: SpeedUp, **arguments: Any) -> Any:
    """What the model's own ``generate`` gives."""
    return speedup.model.generate(**arguments)


def both(
    monkeypatch: pytest.MonkeyPatch, speedup: SpeedUp, **arguments: Any
) -> tuple[Any, Any]:
    """The model's own and ours, with drafts of the model's own output."""
    torch.manual_seed(7)
    expected = plain(speedup, **arguments)
    sequences = expected if isinstance(expected, torch.Tensor) else expected.sequences
    tell(
        monkeypatch,
        sequences,
        arguments["inputs"].shape[1],
        arguments.get("attention_mask"),
    )
    torch.manual_seed(7)
    return expected, speedup(**arguments)


def accepted(speedup: SpeedUp) -> int:
    """Drafted tokens that were kept in the latest call."""
    return sum(
        step.accepted for row in speedup.decoder.last for step in row.stats.steps
    )


def ends_of(speedup: SpeedUp, places: tuple[int, ...] = (4, 9)) -> list[int]:
    """Tokens that end the first rows of the batch at those places."""
    output = plain(speedup, inputs=BATCH, attention_mask=MASK, max_new_tokens=EARLY)
    new = output[:, BATCH.shape[1] :]
    return sorted({int(new[row, place]) for row, place in enumerate(places)})


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_greedy_output_is_generates(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speedup = fast(architecture)
    expected, output = both(
        monkeypatch, speedup, inputs=ONE, max_new_tokens=20, do_sample=False
    )
    assert torch.equal(output, expected)
    if speedup.decoder.model.capability.level != "plain":
        assert accepted(speedup) > 5


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "bloom"])
def test_padded_rows_that_end_early_are_generates(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speedup = fast(architecture)
    ends = ends_of(speedup)
    expected, output = both(
        monkeypatch,
        speedup,
        inputs=BATCH,
        attention_mask=MASK,
        max_new_tokens=EARLY,
        eos_token_id=ends,
    )
    assert torch.equal(output, expected)
    assert accepted(speedup) > 3
    rows = [row.token_ids for row in speedup.decoder.last]
    new = output[:, BATCH.shape[1] :].tolist()
    assert [line[: len(row)] for line, row in zip(new, rows, strict=True)] == rows
    assert any(row.finish == "eos" for row in speedup.decoder.last)


@st.composite
def controls(draw: st.DrawFn) -> dict[str, Any]:
    """Controls of generate that may be combined."""
    ids = st.integers(2, VOCAB - 1)
    some = st.lists(ids, min_size=1, max_size=3, unique=True)
    found: dict[str, Any] = {
        "max_new_tokens": draw(st.integers(1, 14)),
        "do_sample": draw(st.booleans()),
        "eos_token_id": draw(st.none() | st.lists(ids, min_size=1, max_size=12)),
    }
    for name, values in {
        "repetition_penalty": st.sampled_from([1.3, 0.8]),
        "no_repeat_ngram_size": st.sampled_from([1, 2]),
        "bad_words_ids": st.lists(some, min_size=1, max_size=2),
        "suppress_tokens": some,
        "begin_suppress_tokens": some,
        "sequence_bias": st.just([[[5], 9.0], [[7, 8], -9.0]]),
        "min_new_tokens": st.integers(1, 5),
        "forced_eos_token_id": ids,
        "renormalize_logits": st.just(True),
        "encoder_repetition_penalty": st.just(1.4),
        "encoder_no_repeat_ngram_size": st.just(2),
    }.items():
        if draw(st.integers(0, 3)) == 0:
            found[name] = draw(values)
    if found["do_sample"]:
        for name, values in {
            "temperature": st.sampled_from([0.6, 1.7]),
            "top_k": st.sampled_from([0, 3, 20]),
            "top_p": st.sampled_from([0.5, 0.9]),
            "min_p": st.just(0.05),
            "typical_p": st.just(0.8),
            "num_return_sequences": st.just(2),
        }.items():
            if draw(st.booleans()):
                found[name] = draw(values)
    return found


@settings(max_examples=60, deadline=None)
@given(controls(), st.booleans())
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unfeasible length:UserWarning")
def test_any_controls_give_generates_output(
    given_controls: dict[str, Any], padded: bool
) -> None:
    inputs: dict[str, Any] = {"inputs": ONE}
    if padded:
        inputs = {"inputs": BATCH, "attention_mask": MASK}
    arguments = {**inputs, **given_controls}
    speedup = fast()
    torch.manual_seed(7)
    try:
        expected = plain(speedup, **arguments)
    except (ValueError, RuntimeError):
        return  # generate itself refuses the combination, or every token is masked
    with pytest.MonkeyPatch.context() as patch:
        tell(patch, expected, ONE.shape[1], inputs.get("attention_mask"))
        torch.manual_seed(7)
        output = speedup(**arguments)
    assert torch.equal(output, expected)


def test_scores_and_logits_are_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    speedup = fast()
    expected, output = both(
        monkeypatch,
        speedup,
        inputs=ONE,
        max_new_tokens=12,
        do_sample=True,
        top_k=5,
        temperature=0.7,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert type(output) is type(expected)
    assert torch.equal(output.sequences, expected.sequences)
    assert accepted(speedup) > 3
    kinds = ((output.scores, expected.scores), (output.logits, expected.logits))
    for ours, theirs in kinds:
        assert len(ours) == len(theirs) == 12
        for mine, its in zip(ours, theirs, strict=True):
            assert mine.shape == its.shape == (1, VOCAB)
            assert mine.dtype == its.dtype
            assert torch.equal(mine == -torch.inf, its == -torch.inf)
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)
    assert (output.scores[0] == -torch.inf).sum() == VOCAB - 5
    assert output.past_key_values is None


def test_scores_of_a_batch_are_generates_as_long_as_rows_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speedup = fast()
    ends = ends_of(speedup)
    expected, output = both(
        monkeypatch,
        speedup,
        inputs=BATCH,
        attention_mask=MASK,
        max_new_tokens=EARLY,
        eos_token_id=ends,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert output.logits is None
    assert len(output.scores) == len(expected.scores)
    lengths = [len(row.token_ids) for row in speedup.decoder.last]
    assert len(set(lengths)) > 1
    for step, (mine, its) in enumerate(
        zip(output.scores, expected.scores, strict=True)
    ):
        assert mine.shape == its.shape
        for row, length in enumerate(lengths):
            if step < length:
                torch.testing.assert_close(mine[row], its[row], rtol=1e-4, atol=1e-4)
            else:
                assert not mine[row].any()


class Watch(StoppingCriteria):
    """Remembers what it was asked, and ends after some tokens."""

    def __init__(self, after: int) -> None:
        self.seen: list[tuple[list[list[int]], int | None]] = []
        self._after = after

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.seen.append((input_ids.tolist(), None if scores is None else len(scores)))
        return torch.full((len(input_ids),), len(self.seen) >= self._after)


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_criterion_with_state_is_asked_as_generate_asks_it(
    rows: int, scores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    speedup = fast()
    inputs = {"inputs": ONE} if rows == 1 else {"inputs": BATCH, "attention_mask": MASK}
    watches = [Watch(9), Watch(9)]
    outputs = []
    calls: list[Callable[..., Any]] = [functools.partial(plain, speedup), speedup]
    for call, watch in zip(calls, watches, strict=True):
        output = call(
            **inputs,
            max_new_tokens=EARLY,
            eos_token_id=[1],
            stopping_criteria=StoppingCriteriaList([watch]),
            return_dict_in_generate=scores,
            output_scores=scores,
        )
        outputs.append(output.sequences if scores else output)
        tell(monkeypatch, outputs[0], 12, inputs.get("attention_mask"))
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] == 12 + 9
    assert watches[0].seen == watches[1].seen
    assert accepted(speedup) > 3


class Each(StoppingCriteria):
    """Ends each row at a token, and keeps one flag per row, as lm-eval does."""

    def __init__(self, token: int, rows: int) -> None:
        self._token, self._done = token, [False] * rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        for row, line in enumerate(input_ids[:, 12:].tolist()):
            self._done[row] |= self._token in line
        return torch.tensor(self._done)


class All(Each):
    """Ends when every row is done: a plain bool for the whole batch."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return bool(super().__call__(input_ids, scores).all())


@pytest.mark.parametrize("kind", [Each, All])
@pytest.mark.parametrize("eos", [None, [1]])
def test_rows_that_a_criterion_ends_are_padded_or_go_on_as_in_generate(
    kind: type[Each], eos: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    speedup = fast()
    [token, *_] = ends_of(speedup)
    outputs = []
    for call in (functools.partial(plain, speedup), speedup):
        outputs.append(
            call(
                inputs=BATCH,
                attention_mask=MASK,
                max_new_tokens=EARLY,
                eos_token_id=eos,
                stopping_criteria=StoppingCriteriaList([kind(token, 3)]),
            )
        )
        tell(monkeypatch, outputs[0], 12, MASK)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("after", range(2, 9))
def test_of_a_row_that_a_criterion_ends_nothing_is_left_that_was_decoded_beyond(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class First(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
            seen.append([bool(step[0].any()) for step in scores])
            return torch.tensor([input_ids.shape[1] >= 12 + after, False, False])

    seen: list[list[bool]] = []
    _, output = both(
        monkeypatch,
        fast(),
        inputs=BATCH,
        attention_mask=MASK,
        max_new_tokens=EARLY,
        eos_token_id=[1],
        stopping_criteria=StoppingCriteriaList([First()]),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    expected = [step < after for step in range(EARLY)]
    assert [bool(step[0].any()) for step in output.scores] == expected
    assert [bool(step[0].any()) for step in output.logits] == expected
    assert seen[-1] == expected
    first, *others = fast().decoder.last
    assert (len(first.token_ids), first.finish) == (after, "stop")
    assert {row.finish for row in others} == {"length"}


@pytest.mark.parametrize("after", range(2, 9))
def test_a_batch_that_a_criterion_ends_has_stopped(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    speedup = fast()
    arguments = {"inputs": BATCH, "attention_mask": MASK, "max_new_tokens": EARLY}
    tell(monkeypatch, plain(speedup, **arguments), 12, MASK)
    speedup(**arguments, stopping_criteria=StoppingCriteriaList([Watch(after)]))
    for row in speedup.decoder.last:
        assert (len(row.token_ids), row.finish) == (after, "stop")


def test_a_longest_length_below_the_prompts_leaves_one_token() -> None:
    for rows in (ONE, BATCH):
        asked: dict[str, Any] = {"inputs": rows, "max_new_tokens": 9}
        asked["attention_mask"] = (rows != PAD).long()
        asked["stopping_criteria"] = StoppingCriteriaList([MaxLengthCriteria(5)])
        output = fast()(**asked)
        assert output.shape[1] == 13
        assert torch.equal(output, plain(fast(), **asked))


def test_time_ends_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    speedup = fast()
    over = MaxTimeCriteria(max_time=1.0, initial_timestamp=0.0)
    output = speedup(
        inputs=ONE, max_new_tokens=9, stopping_criteria=StoppingCriteriaList([over])
    )
    assert output.shape[1] == 13
    assert speedup.decoder.last[0].finish == "time"


def test_a_grammar_is_asked_once_for_each_emitted_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speedup = fast()
    outputs = []
    for call in (functools.partial(plain, speedup), speedup):
        grammar = Grammar(end=1, most=10)
        output = call(
            inputs=ONE,
            max_new_tokens=20,
            eos_token_id=1,
            logits_processor=LogitsProcessorList([grammar]),
        )
        grammar.check(ONE[0].tolist(), output[0, 12:].tolist())
        outputs.append(output)
        tell(monkeypatch, outputs[0], 12)
    assert torch.equal(*outputs)
    assert accepted(speedup) > 3


@pytest.mark.parametrize(
    "control",
    [
        {"guidance_scale": 1.5},
        {"watermarking_config": WatermarkingConfig(bias=4.0)},
        {"prefix_allowed_tokens_fn": lambda _, ids: [int(ids[-1]) // 2 + 2, 7]},
    ],
)
def test_controls_that_only_generate_honours(
    control: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    speedup = fast()
    expected, output = both(
        monkeypatch, speedup, inputs=ONE, max_new_tokens=10, **control
    )
    assert torch.equal(output, expected)
    without = plain(speedup, inputs=ONE, max_new_tokens=10)
    assert not torch.equal(output, without)


@pytest.mark.parametrize("sequences", [1, 2])
def test_allowed_tokens_are_asked_with_the_number_of_the_prompt(
    sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, output = both(
        monkeypatch,
        fast(),
        inputs=BATCH,
        attention_mask=MASK,
        max_new_tokens=6,
        do_sample=sequences > 1,
        num_return_sequences=sequences,
        prefix_allowed_tokens_fn=lambda prompt, ids: [10 + prompt, 20 + prompt],
    )
    assert torch.equal(output, expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_seed_samples_what_generate_samples_and_leaves_the_generator_as_it_does(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    speedup = fast()
    inputs = {"inputs": ONE} if rows == 1 else {"inputs": BATCH, "attention_mask": MASK}
    arguments = {**inputs, "max_new_tokens": 15, "do_sample": True, "temperature": 1.5}
    torch.manual_seed(3)
    expected, after = plain(speedup, **arguments), torch.get_rng_state()
    tell(monkeypatch, expected, 12, inputs.get("attention_mask"))
    torch.manual_seed(3)
    output = speedup(**arguments)
    assert torch.equal(output, expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert accepted(speedup) > 3


def test_the_decoder_is_a_custom_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_module("llama")
    decoder = foretelling(module)
    arguments = {"inputs": ONE, "max_new_tokens": 20, "do_sample": False}
    expected = module.generate(**arguments)
    tell(monkeypatch, expected, 12)
    output = module.generate(
        **arguments, custom_generate=decoder, strategy=Foretold.name
    )
    assert torch.equal(output, expected)
    [result] = decoder.last
    assert result.choice.strategy == Foretold.name
    assert result.token_ids == output[0, 12:].tolist()
    assert sum(step.accepted for step in result.stats.steps) > 5


def test_the_class_of_a_prompt_may_be_given() -> None:
    module = tiny_module("llama")
    decoder = foretelling(module)
    with pytest.warns(UserWarning, match="plain decoding|profiled"):
        module.generate(
            inputs=ONE, max_new_tokens=3, custom_generate=decoder, prompt_class="code"
        )
    assert decoder.last[0].choice.prompt_class in ("code", None)
    speedup = SpeedUp(module, decoder, prompt_class="code", strategy=Foretold.name)
    speedup(inputs=ONE, max_new_tokens=3)
    assert decoder.last[0].choice.prompt_class == "code"
    speedup(inputs=ONE, max_new_tokens=3, prompt_class="chat")
    assert decoder.last[0].choice.prompt_class == "chat"


class Unknown(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("num_beams", {"num_beams": 2}),
    ("penalty_alpha", {"penalty_alpha": 0.5, "top_k": 4}),
    ("dola_layers", {"dola_layers": "low"}),
    ("force_words_ids", {"force_words_ids": [[5]]}),
    ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
    ("output_attentions", {"output_attentions": True, "return_dict_in_generate": True}),
    (
        "output_hidden_states",
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ),
    ("position_ids", {"position_ids": torch.arange(5, 17)[None]}),
    ("attention_mask", {"attention_mask": torch.tensor([[1] * 6 + [0] * 6])}),
    ("attention_mask", {"attention_mask": torch.tensor([[0] * 12])}),
    ("attention_mask", {"attention_mask": torch.tensor([[1] * 14])}),
    ("attention_mask", {"attention_mask": torch.tensor([[0] * 3 + [1] * 11])}),
    ("input_ids", {"inputs": torch.zeros(1, 0, dtype=torch.long)}),
    ("input_ids", {"inputs": torch.zeros(0, 4, dtype=torch.long)}),
    ("inputs_embeds", {"inputs": None, "inputs_embeds": torch.zeros(1, 4, 32)}),
    ("token_healing", {"token_healing": True}),
    ("cache_implementation", {"cache_implementation": "paged"}),
    ("cache_implementation", {"cache_implementation": "quantized"}),
    ("synced_gpus", {"synced_gpus": True}),
    ("assistant_model", {"assistant_model": object()}),
    ("stop_strings", {"stop_strings": ["w5"]}),
]


@pytest.mark.parametrize(("name", "arguments"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(
    name: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedControlError, match=name) as refused:
        fast()(**{"inputs": ONE, "max_new_tokens": 3, **arguments})
    assert "\n" not in str(refused.value)


def test_every_field_that_is_refused_here_is_refused_unless_it_is_off() -> None:
    assert set(DROP_IN) <= set(FIELDS)
    refused = {
        name: field
        for name, field in {**FIELDS, **DROP_IN}.items()
        if field.effect == "refused"
    }
    assert len(refused) > 10
    for name, field in refused.items():
        config = GenerationConfig(return_dict_in_generate=True)
        for value in field.neutral:
            setattr(config, name, value)
            check_configuration(config)
        setattr(config, name, 1 if name == "token_healing" else 7)
        with pytest.raises(UnsupportedControlError, match=f"^{name}="):
            check_configuration(config)


def test_a_field_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "foreign_fields", lambda: {"new_in_transformers"})
    config = GenerationConfig()
    config.new_in_transformers = 3
    with pytest.raises(UnsupportedControlError, match=r"^new_in_transformers=3.*None"):
        check_configuration(config)


def test_positions_of_the_mask_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, output = both(
        monkeypatch,
        fast(),
        inputs=BATCH,
        attention_mask=MASK,
        position_ids=(MASK.cumsum(-1) - 1).clamp_min(0),
        max_new_tokens=6,
    )
    assert torch.equal(output, expected)


def test_a_callers_cache_is_refused() -> None:
    from transformers import DynamicCache

    speedup = fast()
    decoder = speedup.decoder
    for call in (
        speedup,
        functools.partial(speedup.model.generate, custom_generate=decoder),
    ):
        with pytest.raises(UnsupportedControlError, match="cache"):
            call(inputs=ONE, max_new_tokens=3, cache=DynamicCache())


def test_a_processor_that_may_look_at_all_rows_is_refused_in_a_batch() -> None:
    processors = LogitsProcessorList([Unknown()])
    with pytest.raises(UnsupportedControlError, match=r"Unknown.*one prompt at a time"):
        fast()(
            inputs=BATCH,
            attention_mask=MASK,
            max_new_tokens=3,
            logits_processor=processors,
        )
    fast()(inputs=ONE, max_new_tokens=3, logits_processor=processors)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("guidance_scale=1.5", {"guidance_scale": 1.5}),
        (
            "watermarking_config=SynthIDTextWatermarkingConfig",
            {
                "watermarking_config": SynthIDTextWatermarkingConfig(3, [1, 2, 3]),
                "do_sample": True,
            },
        ),
    ],
)
def test_what_looks_at_all_rows_is_refused_by_the_field_that_asks_for_it(
    name: str, arguments: dict[str, Any]
) -> None:
    several: list[dict[str, Any]] = [
        {"inputs": ONE.repeat(2, 1)},
        {"inputs": ONE, "do_sample": True, "num_return_sequences": 2},
    ]
    for rows in several:
        with pytest.raises(UnsupportedControlError) as refused:
            fast()(max_new_tokens=3, **{**arguments, **rows})
        told = str(refused.value)
        assert told.startswith(name)
        assert "one prompt at a time, and num_return_sequences=1" in told
        assert "\n" not in told


def test_pictures_are_refused_by_the_argument_they_came_in() -> None:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = tiny_module("llama").config
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=63
    )
    seeing: Any = transformers.LlavaForConditionalGeneration(config)
    seeing = seeing.float().eval()
    seeing.generation_config.pad_token_id = PAD
    speedup = foretold(seeing)
    prompt = torch.tensor([[5, 63, 63, 63, 63, 7]])
    with pytest.raises(UnsupportedControlError, match=r"^pixel_values can't.*pictures"):
        speedup(inputs=prompt, pixel_values=torch.zeros(1, 3, 8, 8), max_new_tokens=3)


@pytest.mark.parametrize(
    ("name", "value"), [("streamer", object()), ("assistant_model", object())]
)
def test_what_transformers_drops_on_the_way_is_refused(name: str, value: Any) -> None:
    class Streamer:
        def put(self, value: Any) -> None:
            """Take it."""

    speedup = fast()
    given = Streamer() if name == "streamer" else value
    with pytest.raises(UnsupportedControlError, match=f"{name}.*hand it on"):
        speedup.model.generate(
            inputs=ONE,
            max_new_tokens=3,
            custom_generate=speedup.decoder,
            **{name: given},
        )


def test_another_model_and_dropout_are_refused() -> None:
    other = tiny_module("llama", seed=1)
    with pytest.raises(UnsupportedControlError, match="of the model that generates"):
        other.generate(inputs=ONE, max_new_tokens=3, custom_generate=fast().decoder)
    with pytest.raises(UnsupportedControlError, match="of the model that generates"):
        SpeedUp(other, fast().decoder)
    dropping = tiny_module("gpt2", resid_pdrop=0.3)
    speedup = foretold(dropping)
    dropping.train()
    with pytest.raises(UnsupportedControlError, match="training mode"):
        speedup(inputs=ONE, max_new_tokens=3)
    still = tiny_module("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    speedup = foretold(still)
    still.train()
    assert speedup(inputs=ONE, max_new_tokens=3).shape == (1, 15)


def test_output_that_the_model_has_no_positions_for_is_cut_and_said() -> None:
    speedup = foretold(tiny_module("llama", max_position_embeddings=16))
    with pytest.warns(UserWarning, match="after 4 tokens in place of 9"):
        output = speedup(inputs=ONE, max_new_tokens=9)
    assert output.shape == (1, 16)
    assert torch.equal(output, plain(speedup, inputs=ONE, max_new_tokens=4))


def test_a_prompt_that_leaves_no_position_is_refused_with_a_way_out() -> None:
    speedup = foretold(tiny_module("llama", max_position_embeddings=12))
    with pytest.raises(InvalidPromptError, match=r"of 12; shorten it, .*own generate"):
        speedup(inputs=ONE, max_new_tokens=3)


@pytest.mark.parametrize("rows", [1, 3])
def test_an_error_midway_frees_every_row(rows: int) -> None:
    class Fails(StoppingCriteria):
        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 4:
                raise RuntimeError("midway")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    inputs = {"inputs": ONE} if rows == 1 else {"inputs": BATCH, "attention_mask": MASK}
    before = Foretold.open
    with pytest.raises(RuntimeError, match="midway"):
        fast()(
            **inputs,
            max_new_tokens=9,
            stopping_criteria=StoppingCriteriaList([Fails()]),
        )
    assert Foretold.open == before
