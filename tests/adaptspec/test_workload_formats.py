"""Rows as people have them give the prompt that they hold."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import tiny_module, tiny_tokenizer
from adaptspec.workload_formats import LAYOUT_KEYS, BadRow, NoUser, understand
from adaptspec.workloads import Message, Prompt

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def said(row: object, answers: bool = False) -> list[tuple[str, str | None]]:
    """Who says what; a text is a user's."""
    found = understand(row, answers)
    if found.text is not None:
        return [("user", found.text)]
    return [(message.role, message.content) for message in found.messages]


texts = st.text(min_size=1, max_size=8).filter(lambda t: t.isprintable())


@pytest.mark.slow
@given(texts, texts, texts)
def test_every_layout_of_a_conversation_gives_the_same_prompt(
    first: str, answer: str, second: str
) -> None:
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    parts = [
        {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
    ]
    speakers = {"user": "human", "assistant": "gpt"}
    turns = [{"from": speakers[m["role"]], "value": m["content"]} for m in messages]
    expected = [("user", first), ("assistant", answer), ("user", second)]
    late = {"role": "assistant", "content": "later"}
    for row in (
        {"messages": messages},
        {"prompt": messages},
        {"messages": parts},
        {"messages": [*messages, late]},
        {"conversations": turns},
        {"conversations": [*turns, {"from": "gpt", "value": "later"}]},
        {"custom_id": "a", "body": {"messages": messages}},
        {"body": {"input": messages}},
    ):
        assert said(row) == expected
    alone = [("user", first)]
    assert said({"turns": [first, second]}) == alone
    assert said({"instruction": first, "output": answer}) == alone
    assert said({"instruction": first, "input": second}) == [
        ("user", f"{first}\n\n{second}")
    ]


def test_answers_are_kept_where_they_are_asked_for() -> None:
    whole = [("user", "Hi"), ("assistant", "Hello")]
    for row in (
        {"messages": [USER, ANSWER]},
        {"instruction": "Hi", "output": "Hello"},
        {
            "conversations": [
                {"from": "user", "value": "Hi"},
                {"from": "bard", "value": "Hello"},
            ]
        },
    ):
        assert said(row, answers=True) == whole
        assert said(row) == whole[:1]


def test_a_request_of_openais_batches_gives_its_limit_id_and_tools() -> None:
    found = understand(
        {
            "custom_id": "request-1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "m",
                "messages": [USER],
                "max_tokens": 9,
                "tools": [TOOL],
            },
        }
    )
    assert (found.id, found.max_new_tokens, found.tools) == ("request-1", 9, (TOOL,))
    assert found.unread == ()
    completion = understand({"body": {"prompt": "Hi", "max_completion_tokens": 3}})
    assert (completion.text, completion.raw) == ("Hi", True)
    assert completion.max_new_tokens == 3


def test_spec_benchs_category_is_the_class() -> None:
    found = understand(
        {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": []}
    )
    assert (found.id, found.prompt_class, found.unread) == ("81", "writing", ())
    assert (
        understand({"prompt": "a", "category": "b", "class": "c"}).prompt_class == "c"
    )


def test_calls_and_answers_of_tools_reach_the_chat_template() -> None:
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 2}'}}
    found = understand(
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "5"},
                ANSWER,
            ],
            "tools": [TOOL],
        }
    )
    assert [m.role for m in found.messages] == ["user", "assistant", "tool"]
    messages = tuple(Message(m.role, m.content or "", m.more) for m in found.messages)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for t in tools %}w{{ t.function.name | length }} {% endfor %}"
        "{% for m in messages %}"
        "{% if m.content is defined %}w1 {% endif %}"
        "{% for c in m.tool_calls or [] %}w{{ c.function.arguments.a }} {% endfor %}"
        "{% if m.tool_call_id %}w{{ m.content }} {% endif %}"
        "{% endfor %}"
    )
    model = LanguageModel(tiny_module("llama"), tokenizer, "llama", accelerate=False)
    prompt = Prompt("1", messages=messages, tools=found.tools)
    expected = model.encode("w3 w1 w2 w1 w5", raw=True)
    assert prompt.encode(model) == expected


def test_a_conversation_without_a_user_is_told_apart() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [ANSWER]},
        {"conversations": [{"from": "gpt", "value": "Hello"}]},
        {"conversations": []},
    ]
    for row in rows:
        with pytest.raises(NoUser):
            understand(row)


scalars = st.none() | st.booleans() | st.integers(-2, 9) | st.text(max_size=3)
OTHERS = (
    "role content from value text type tools id raw class category tool_calls "
    "function arguments max_tokens x"
)
keys = st.sampled_from([*LAYOUT_KEYS, *OTHERS.split()])
values: Any = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(keys, values, max_size=4) | values, st.booleans())
def test_whatever_a_row_holds_is_read_or_refused_in_one_line(
    row: Any, answers: bool
) -> None:
    refused: BadRow | None = None
    try:
        found = understand(row, answers)
    except BadRow as bad:
        refused = bad
    if refused is not None:
        assert len(str(refused).splitlines()) == 1
        assert refused.way_out.startswith("write {")
        return
    assert (found.text is None) != (not found.messages)
    if not answers and found.messages:
        assert found.messages[-1].role != "assistant"
