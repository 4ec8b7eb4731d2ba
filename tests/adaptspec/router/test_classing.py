"""A request's class: by header, by the last message, by the text, or none."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.decoder import Decoder
from adaptspec.errors import RoutingError
from adaptspec.router.classing import (
    NotJson,
    as_header,
    named_class,
    read_body,
    told_class,
)
from adaptspec.router.table import RouteTable
from adaptspec.testing.fakes import tiny_model
from classifiers import LONG, SHORT, by_hand

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("request_value", "expected"),
    [
        ({"messages": [user(SHORT)]}, "short"),
        ({"messages": [user(SHORT), user(LONG)]}, "long"),
        ({"messages": [user([{"type": "text", "text": LONG}])]}, "long"),
        ({"messages": [user("entirely unlike either of them")]}, None),
        ({"messages": []}, None),
        ({"messages": "no list"}, "unlike"),
        ({"messages": None, "prompt": SHORT}, None),
        ({"prompt": SHORT}, "short"),
        ({"prompt": [LONG]}, "long"),
        ({"prompt": [LONG, LONG]}, "long"),
        ({"prompt": [LONG, SHORT]}, None),
        ({"prompt": [1, 2, 3]}, None),
        ({"prompt": [[1, 2], [3]]}, None),
        ({"prompt": []}, None),
        ({"prompt": {"text": SHORT}}, None),
        ({}, None),
        ([SHORT], None),
        (SHORT, None),
        (None, None),
    ],
)
def test_the_class_is_that_of_the_last_message_or_the_text(
    request_value: Any, expected: str | None
) -> None:
    found = told_class(by_hand(), request_value)
    assert found == (None if expected == "unlike" else expected)
    assert told_class(None, request_value) is None


@pytest.mark.slow
@given(VALUES, st.sampled_from(["messages", "prompt"]))
def test_any_json_has_a_class_or_none(value: Any, key: str) -> None:
    for given_value in (value, {key: value}, {key: [value]}):
        assert told_class(by_hand(), given_value) in (None, "short", "long")


@functools.cache
def decoder() -> Decoder:
    made = Decoder(tiny_model("llama"))
    made._classifier = by_hand()
    return made


@given(st.lists(st.text(max_size=40) | st.sampled_from([SHORT, LONG]), min_size=1))
def test_it_is_the_class_that_a_decoder_tells(contents: list[str]) -> None:
    messages = [user(content) for content in contents]
    told = decoder().classify(messages)
    assert told is not None
    assert told_class(by_hand(), {"messages": messages}) == told.prompt_class


@pytest.mark.slow
@given(VALUES, st.booleans(), st.sampled_from(["utf-8", "utf-16", "utf-32"]))
def test_a_body_is_read_as_json_is(value: Any, ascii_only: bool, encoding: str) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    if any("\ud800" <= c <= "\udfff" for c in text):
        return
    assert read_body(text.encode(encoding)) == value


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "line 1 column 1"),
        (b'{"prompt": secret}', "line 1 column 12"),
        (b'{"prompt":\n "secret"', "line 2 column 10"),
        (b'{"prompt": "secret\xff"}', "byte 18"),
    ],
)
def test_what_is_no_json_is_told_without_a_word_of_it(body: bytes, told: str) -> None:
    with pytest.raises(NotJson) as refused:
        read_body(body)
    assert told in str(refused.value)
    assert "secret" not in str(refused.value)


def test_what_is_nested_too_deeply_has_no_class() -> None:
    assert read_body(b"[" * 200_000 + b"]" * 200_000) is None
    assert read_body(b"9" * 10_000) is None


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_class_is_named_by_its_header_form(name: str) -> None:
    table = RouteTable.model_validate(
        {"servers": {"a": "http://h"}, "classes": {name: "a"}, "default": "a"}
    )
    header = as_header(name)
    assert header.isascii()
    assert header.isprintable()
    assert header == "".join(header.split())
    assert named_class(table, header) == name
    assert named_class(table, name) == name


def test_a_class_that_is_not_there_is_refused_with_those_that_are() -> None:
    table = RouteTable.model_validate(
        {"servers": {"a": "http://h"}, "classes": {"code": "a"}, "default": "a"}
    )
    with pytest.raises(RoutingError, match="no class 'chat'; the table has: code"):
        named_class(table, "chat")
