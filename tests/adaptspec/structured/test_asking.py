"""The ways to ask for structured output, and what is said of those that fail."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from pydantic import BaseModel

pytest.importorskip("llguidance")

from adaptspec.decoder import Decoder
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.errors import InvalidGrammarError, UnsupportedControlError
from adaptspec.testing.fakes import tiny_model, tiny_tokenizer
from adaptspec.testing.strategies import plain_strategy
from speakers import END, speaker


class User(BaseModel, extra="forbid"):
    ok: bool
    kind: None


def answers(**controls: Any) -> str:
    asked = Controls(300, eos_token_ids=(END,), **controls)
    done = Engine(speaker()).generate(plain_strategy(), [5, 6, 7], asked)
    assert done.finish == "eos"
    return speaker().decode(done.token_ids)


def refused(**controls: Any) -> str:
    with pytest.raises((InvalidGrammarError, UnsupportedControlError)) as failed:
        Run(Engine(speaker()), plain_strategy(), [5, 6, 7], Controls(**controls))
    message = str(failed.value)
    assert "\n" not in message
    return message


COMPACT = User.model_json_schema() | {"x-guidance": {"whitespace_flexible": False}}


@pytest.mark.parametrize("schema", [COMPACT, json.dumps(COMPACT)])
def test_a_schema_is_a_mapping_or_a_text_and_sets_the_layout(schema: Any) -> None:
    text = answers(json_schema=schema)
    assert text.replace("true", "false") == '{"ok":false,"kind":null}'


def test_a_pydantic_class_is_a_schema() -> None:
    assert User.model_validate_json(answers(json_schema=User)).kind is None


def test_between_the_parts_of_json_blanks_have_an_end() -> None:
    """Some models would write nothing else."""
    blanks = {*speaker().encode(" \n", raw=True), *speaker().encode(" ", raw=True)}
    liked = [[[token], 1e6] for token in blanks]
    controls = Controls(
        300,
        eos_token_ids=(END,),
        json_schema=User,
        extra={"sequence_bias": liked},
    )
    done = Engine(speaker()).generate(plain_strategy(), [5, 6, 7], controls)
    assert done.finish == "eos"
    assert User.model_validate_json(speaker().decode(done.token_ids)).kind is None


def test_true_is_any_json_value() -> None:
    controls = Controls(3, json_schema=True)
    run = Run(Engine(speaker()), plain_strategy(), [5, 6, 7], controls)
    assert len([token for step in run for token in step]) in (1, 2, 3)
    assert "Unsatisfiable" in refused(json_schema=False)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ('{"type": ', "json_schema isn't JSON: Expecting value: line 1 column 10"),
        ({"type": "foo"}, "json_schema at /: Invalid type: foo"),
        (
            {"properties": {"a/b": {"items": {"type": "string", "pattern": "a("}}}},
            "json_schema at /properties/a~1b/items: 'a(', character 2: unclosed group",
        ),
        (
            {"anyOf": [{"type": "null"}, {"type": "string", "format": "nope"}]},
            "json_schema at /anyOf/1: Unknown format: nope",
        ),
        (
            {"$defs": {"x": {"not": {}}}, "properties": {"a": {"$ref": "#/$defs/x"}}},
            'json_schema at /$defs/x: Unimplemented keys: ["not"]',
        ),
        (
            {"properties": {"a": {"$ref": "#/$defs/gone"}}},
            "json_schema at /properties/a: Pointer '/$defs/gone' does not exist",
        ),
        ({"type": {1, 2}}, "json_schema isn't JSON: Object of type set"),
        (3, "json_schema must be a mapping, True, JSON text or a pydantic model"),
        (["a"], "json_schema must be a mapping, True, JSON text or a pydantic model"),
    ],
)
def test_a_bad_schema_is_one_line_that_names_the_place(schema: Any, said: str) -> None:
    assert refused(json_schema=schema).startswith(said)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("ab(", "regex 'ab(', character 3: unclosed group"),
        ("a(?!b)", "regex 'a(?!b)', character 2: look-around"),
        ("[", "regex '[', character 1: unclosed character class"),
    ],
)
def test_a_bad_regular_expression_is_one_line_with_the_place(
    pattern: str, said: str
) -> None:
    assert refused(regex=pattern).startswith(said)


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ('root ::= "yes" | foo', "grammar: Rule 'foo' not found"),
        ('root ::= "a"\nx ::= ("b"', "grammar: Expected ')' at line 2"),
        ("start: foo", 'grammar: line 1, column 8: unknown name: "foo"'),
        ('start: "a"\nx: (', "grammar: line 2, column 5: Expected token ')'"),
        ("start: /[/", "grammar: line 1, column 8: '[', character 1: unclosed"),
        ("", "grammar: No 'root' rule found"),
    ],
)
def test_a_bad_grammar_is_one_line_with_the_place(grammar: str, said: str) -> None:
    assert refused(grammar=grammar).startswith(said)


def test_one_language_at_most_and_each_of_its_type() -> None:
    said = "one of json_schema, regex, grammar at most, got json_schema and regex"
    assert refused(json_schema={}, regex="a") == said
    assert refused(regex=3) == "regex must be a text, got 3"


def test_without_the_extra_the_command_to_install_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    said = "regex needs llguidance: pip install 'adaptspec[structured]'"
    assert refused(regex="a") == said


def test_a_model_without_a_tokenizer_that_can_be_read_is_refused() -> None:
    for tokenizer, said in (
        (None, "regex needs the model's tokenizer"),
        (tiny_tokenizer(), "regex needs a tokenizer that llguidance can read"),
    ):
        model = tiny_model("llama", tokenizer=tokenizer)
        with pytest.raises(UnsupportedControlError, match=said):
            Run(Engine(model), plain_strategy(), [5], Controls(regex="a"))


def test_a_decoder_takes_them_as_arguments() -> None:
    decoder = Decoder(speaker(), record=False)
    with pytest.warns(UserWarning, match="plain decoding"):
        result = decoder.generate("status", raw=True, regex="yes|no", temperature=0)
    assert result.text in ("yes", "no")
    assert result.finish == "eos"
    stream = decoder.stream("status", raw=True, regex="yes|no", temperature=0)
    assert "".join(stream) == result.text
    with pytest.raises(InvalidGrammarError, match="unclosed group"):
        decoder.stream("status", raw=True, regex="(")
