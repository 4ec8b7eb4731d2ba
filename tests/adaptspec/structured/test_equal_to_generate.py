"""Structured output is what transformers' generate gives under the same grammar."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("llguidance")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, grammar_from

import adaptspec_plugins
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Generation, Run
from adaptspec.errors import NoValidTokenError
from adaptspec.host import Host
from adaptspec.profile import PLAIN
from adaptspec.structured.languages import JSON_LAYOUT
from adaptspec.testing.heads import attach_tiny_heads
from speakers import (
    END,
    OTHER_END,
    POSITIONS,
    Partial,
    Theirs,
    generates,
    speaker,
    speakers_draft,
)

NEW_TOKENS = 48

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "status": {"enum": ["active", "suspended", "deleted"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "status", "tags"],
    "additionalProperties": False,
}
LIST = 'root ::= item item item\nitem ::= "- " [a-z] [a-z]? "\\n"'
PATTERN = "(yes|no|yesterday)(, [0-9]{2,3}(\\.[0-9])?){1,4}: namely"

LANGUAGES: dict[str, dict[str, Any]] = {
    "schema": {"json_schema": SCHEMA},
    "regex": {"regex": PATTERN},
    "grammar": {"grammar": LIST},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "prompt_lookup": {"branches": 3, "policy": "frequent", "max_ngram": 2},
    "suffix": {},
    "token_recycling": {},
    "lookahead": {},
    "hybrid": {},
    "draft_model": {"draft_length": 4},
    "draft_tree": {},
}


def grammar_of(control: str, value: Any) -> str:
    """The same language, as llguidance is told of it without us."""
    if control == "json_schema":
        return LLMatcher.grammar_from_json_schema(value, JSON_LAYOUT)
    return grammar_from("regex" if control == "regex" else "grammar", value)


@functools.cache
def host() -> Host:
    return Host({"bundled": adaptspec_plugins})


def prompt(seed: int = 0) -> list[int]:
    """Words that the languages have, too, so that prompt lookup finds something."""
    texts = ['A user: {"name": "Ada", "age": 3', "yes, 42, 17: ", "- a\n- b\n- ab\n"]
    model = speaker()
    return model.encode(texts[seed % 3] + "status active tags", raw=True)


def decoded(
    strategy: str,
    ids: Sequence[int],
    seed: int = 0,
    params: dict[str, Any] | None = None,
    **controls: Any,
) -> Generation:
    engine = Engine(speaker(seed), speakers_draft(seed))
    setting = STRATEGIES[strategy] if params is None else params
    asked = {"max_new_tokens": NEW_TOKENS, "eos_token_ids": (END,), **controls}
    return engine.generate(host().create(strategy, setting), ids, Controls(**asked))


@functools.cache
def truth(language: str, seed: int) -> list[int]:
    [(control, value)] = LANGUAGES[language].items()
    processor = Theirs(speaker(seed), grammar_of(control, value))
    return generates(speaker(seed), prompt(seed), processor, NEW_TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_emits_generates_tokens(strategy: str, language: str) -> None:
    for seed in range(3):
        done = decoded(strategy, prompt(seed), seed, **LANGUAGES[language])
        assert done.token_ids == truth(language, seed)
        assert done.finish == ("eos" if END in done.token_ids else "length")


@pytest.mark.parametrize("strategy", ["autoregressive", "token_recycling", "hybrid"])
def test_a_regular_expression_is_what_another_library_reads(strategy: str) -> None:
    """Where no text is forced; there llguidance leaves one spelling of several."""
    pattern = "([a-d]{1,4}|[0-9]{1,3}[,.])+( true| false)?"
    for seed in range(3):
        ids, model = prompt(seed), speaker(seed)
        wanted = generates(model, ids, Partial(model, pattern, len(ids)), NEW_TOKENS)
        assert decoded(strategy, ids, seed, regex=pattern).token_ids == wanted


@pytest.mark.parametrize(
    "controls",
    [
        {"repetition_penalty": 1.3},
        {"extra": {"no_repeat_ngram_size": 3}},
        {"extra": {"min_new_tokens": 4, "suppress_tokens": [300, 301]}},
    ],
)
def test_other_controls_come_before_as_in_generate(controls: dict[str, Any]) -> None:
    theirs = controls.get("extra", controls)
    for seed in range(2):
        ids, model = prompt(seed), speaker(seed)
        processor = Theirs(model, grammar_of("regex", PATTERN))
        wanted = generates(model, ids, processor, NEW_TOKENS, **theirs)
        for strategy in ("token_recycling", "autoregressive"):
            done = decoded(strategy, ids, seed, regex=PATTERN, **controls)
            assert done.token_ids == wanted


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 7])
def test_the_limit_cuts_wherever_it_is(new_tokens: int) -> None:
    for strategy in ("autoregressive", "prompt_lookup", "draft_model"):
        done = decoded(
            strategy, prompt(), json_schema=SCHEMA, max_new_tokens=new_tokens
        )
        assert done.token_ids == truth("schema", 0)[:new_tokens]
        assert done.finish == "length"


@pytest.mark.slow
def test_of_several_ends_the_scores_choose() -> None:
    """Some models would rather end with the second; the language has no say."""
    ends, chosen = (END, OTHER_END), set()
    for seed in range(6):
        ids, model = prompt(seed), speaker(seed)
        processor = Theirs(model, grammar_of("regex", "(yes|no)"), ends)
        wanted = generates(model, ids, processor, 9, ends)
        for strategy in ("autoregressive", "prompt_lookup"):
            done = decoded(strategy, ids, seed, regex="(yes|no)", eos_token_ids=ends)
            assert done.token_ids == wanted
            assert done.finish == "eos"
        chosen.add(wanted[-1])
    assert chosen == set(ends)


def test_without_an_end_of_sequence_a_finished_grammar_ends_the_output() -> None:
    done = decoded("prompt_lookup", prompt(), regex="(yes|no): 42", eos_token_ids=())
    assert done.finish == "stop"
    assert END not in done.token_ids
    assert speaker().decode(done.token_ids) in ("yes: 42", "no: 42")


def test_a_control_that_forbids_the_end_is_an_error_by_name() -> None:
    with pytest.raises(NoValidTokenError, match="leave no finite score"):
        decoded("prompt_lookup", prompt(), regex="no", extra={"min_new_tokens": 30})


def test_forced_tokens_save_forwards_without_a_drafter() -> None:
    pattern = "the answer is (yes|no), namely: active or suspended"
    drafts = decoded("autoregressive", prompt(), regex=pattern)
    plain = decoded("autoregressive", prompt(), regex=pattern, max_nodes=0)
    assert drafts.token_ids == plain.token_ids
    assert plain.stats.forced == plain.stats.proposed == 0
    assert drafts.stats.forced > 5
    assert drafts.stats.target_forwards < plain.stats.target_forwards / 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["prompt_lookup", "token_recycling", "hybrid"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_sampled_output_is_that_of_plain_decoding(strategy: str, language: str) -> None:
    """Deterministic proposals: one seed, one output."""
    controls = {**LANGUAGES[language], "temperature": 1.5, "top_k": 40}
    outputs = set()
    engine = Engine(speaker(), speakers_draft())
    plain = host().create("autoregressive", {})
    drafting = host().create(strategy, STRATEGIES[strategy])
    for seed in range(4):
        asked = Controls(NEW_TOKENS, eos_token_ids=(END,), **controls, seed=seed)
        wanted = engine.generate(plain, prompt(), asked).token_ids
        assert engine.generate(drafting, prompt(), asked).token_ids == wanted
        outputs.add(tuple(wanted))
    assert len(outputs) > 1


def test_interleaved_sequences_keep_their_places() -> None:
    engine = Engine(speaker(), speakers_draft())
    strategy = host().create("token_recycling", {})
    wanted, runs = [], []
    for seed in range(3):
        ids = prompt(seed)
        processor = Theirs(speaker(), grammar_of("json_schema", SCHEMA))
        wanted.append(generates(speaker(), ids, processor, NEW_TOKENS))
        controls = Controls(NEW_TOKENS, eos_token_ids=(END,), json_schema=SCHEMA)
        runs.append(Run(engine, strategy, ids, controls))
    steps = [iter(run) for run in runs]
    while steps:
        steps = [step for step in steps if next(step, None) is not None]
    assert [run.result.token_ids for run in runs] == wanted


def test_threads_keep_their_places() -> None:
    wanted = [truth(language, seed) for language in LANGUAGES for seed in range(3)]
    found: dict[int, list[int]] = {}

    def decode(at: int, language: str, seed: int) -> None:
        done = decoded("prompt_lookup", prompt(seed), seed, **LANGUAGES[language])
        found[at] = done.token_ids

    cases = [(language, seed) for language in LANGUAGES for seed in range(3)]
    threads = [
        threading.Thread(target=decode, args=(at, *case))
        for at, case in enumerate(cases)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at] for at in range(len(cases))] == wanted


def schemas() -> st.SearchStrategy[Any]:
    """Schemas whose values are short."""
    words = st.sampled_from(["name", "age", "tags", "ok", "é", "a b"])
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda low, size: {
                "type": "integer",
                "minimum": low,
                "maximum": low + size,
            },
            st.integers(-50, 50),
            st.integers(0, 200),
        ),
        st.builds(
            lambda most: {"type": "string", "maxLength": most}, st.integers(0, 5)
        ),
        st.builds(lambda values: {"enum": values}, st.lists(words, min_size=1)),
        st.just({"type": "string", "pattern": "^[a-c]{1,3}$"}),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(
                lambda items: {
                    "type": "object",
                    "properties": items,
                    "required": list(items),
                    "additionalProperties": False,
                },
                st.dictionaries(words, inner, max_size=3),
            ),
            st.builds(
                lambda items: {"type": "array", "items": items, "maxItems": 2}, inner
            ),
            st.builds(
                lambda options: {"anyOf": options},
                st.lists(inner, min_size=1, max_size=3),
            ),
        ),
        max_leaves=4,
    )


def holds(schema: Any, value: Any) -> bool:
    """Whether a value is one of such a schema, by the standard."""
    if "anyOf" in schema:
        return any(holds(option, value) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        inner = schema["properties"]
        return (
            isinstance(value, dict)
            and set(value) == set(inner)
            and all(holds(inner[name], value[name]) for name in inner)
        )
    if kind == "array":
        items = schema["items"]
        return (
            isinstance(value, list)
            and len(value) <= 2
            and all(holds(items, one) for one in value)
        )
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string" and "pattern" in schema:
        return isinstance(value, str) and re.fullmatch("[a-c]{1,3}", value) is not None
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    return value is None if kind == "null" else isinstance(value, bool)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    schema=schemas(),
    seed=st.integers(0, 5),
    strategy=st.sampled_from(["prompt_lookup", "hybrid", "draft_tree", "lookahead"]),
)
@pytest.mark.slow
def test_any_schema_gives_generates_json(schema: Any, seed: int, strategy: str) -> None:
    ids, model = prompt(seed), speaker(seed)
    processor = Theirs(model, grammar_of("json_schema", schema))
    wanted = generates(model, ids, processor, NEW_TOKENS)
    done = decoded(strategy, ids, seed, json_schema=schema)
    assert done.token_ids == wanted
    if done.finish == "eos":
        value = json.loads(model.decode(done.token_ids))
        assert holds(schema, value)


def test_a_prompt_at_the_models_limit_ends_with_its_last_position() -> None:
    ids = (prompt() * 99)[: POSITIONS - 9]
    done = decoded("hybrid", ids, json_schema=SCHEMA)
    assert len(done.token_ids) == 9
    processor = Theirs(speaker(), grammar_of("json_schema", SCHEMA))
    assert done.token_ids == generates(speaker(), ids, processor, 9)


def test_typical_acceptance_is_exact_under_a_grammar() -> None:
    """It would ask what follows the end of the output, where nothing may."""
    model = attach_tiny_heads(speaker.__wrapped__())  # others mustn't have them
    asked: dict[str, Any] = {
        **{"max_new_tokens": NEW_TOKENS, "eos_token_ids": (END,), "seed": 1},
        **{"temperature": 1.0, "regex": "yes|no, because x"},
    }

    def generated(strategy: str, **more: Any) -> Generation:
        controls = Controls(**asked, **more)
        return Engine(model).generate(host().create(strategy, {}), prompt(), controls)

    found = generated("medusa_typical")
    assert found.token_ids == generated(PLAIN, max_nodes=0).token_ids
    assert found.finish == "eos"
