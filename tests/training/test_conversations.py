"""Training data: which tokens are answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaptspec.errors import InvalidPromptError, WorkloadError
from adaptspec.model.language_model import LanguageModel
from adaptspec_training.conversations import (
    Example,
    encode_conversation,
    read_data,
    with_answers,
    without_answers,
)

TALK = [
    {"role": "user", "content": "w2 w3"},
    {"role": "assistant", "content": "w4 w5 w6"},
    {"role": "user", "content": "w7"},
    {"role": "assistant", "content": "w8 w9"},
]


def test_targets_end_with_their_answer() -> None:
    example = Example("x", tuple(range(10, 20)), ((2, 4), (6, 10)))
    assert example.positions == [1, 2, 5, 6, 7, 8]
    assert example.targets(1) == [12, 13, 16, 17, 18, 19]
    assert example.targets(2) == [13, -100, 17, 18, 19, -100]
    assert example.targets(4) == [-100, -100, 19, -100, -100, -100]


def test_every_assistant_turn_is_an_answer(
    target: Callable[..., LanguageModel], write_lines: Callable[..., Path]
) -> None:
    (prompt,) = read_data(write_lines({"messages": TALK})).prompts
    example = encode_conversation(target(), prompt, 100)
    assert example is not None
    assert example.tokens == (2, 3, 4, 5, 6, 7, 8, 9)
    assert example.spans == ((2, 5), (6, 8))


def test_what_is_too_long_is_cut_and_left_out_without_an_answer(
    target: Callable[..., LanguageModel], write_lines: Callable[..., Path]
) -> None:
    (prompt,) = read_data(write_lines({"messages": TALK})).prompts
    cut = encode_conversation(target(), prompt, 7)
    assert cut is not None
    assert cut.spans == ((2, 5), (6, 7))
    assert len(cut.tokens) == 7
    assert encode_conversation(target(), prompt, 2) is None


def test_a_template_that_changes_earlier_turns_is_refused(
    target: Callable[..., LanguageModel], write_lines: Callable[..., Path]
) -> None:
    model = target()
    model.tokenizer.chat_template = (
        "w{{ messages | length + 1 }} "
        "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    )
    (prompt,) = read_data(write_lines({"messages": TALK})).prompts
    with pytest.raises(InvalidPromptError, match="renders a turn differently"):
        encode_conversation(model, prompt, 100)


def test_sharegpt_is_read_as_lines_and_as_an_array(
    write_lines: Callable[..., Path], tmp_path: Path
) -> None:
    row = {
        "id": "one",
        "conversations": [
            {"from": "human", "value": "hello"},
            {"from": "gpt", "value": "hi"},
        ],
    }
    array = tmp_path / "array.json"
    array.write_text(json.dumps([row, {**row, "id": "two"}]))
    lines = read_data(write_lines(row))
    assert [p.id for p in read_data(array).prompts] == ["one", "two"]
    assert lines.prompts[0].messages == read_data(array).prompts[0].messages
    assert with_answers(lines)
    assert [m.role for m in without_answers(lines).prompts[0].messages] == ["user"]


def test_sharegpts_cut_conversations_begin_with_the_user_or_are_left_out(
    target: Callable[..., LanguageModel], write_lines: Callable[..., Path]
) -> None:
    def row(*turns: tuple[str, str]) -> dict[str, Any]:
        return {"conversations": [{"from": s, "value": v} for s, v in turns]}

    path = write_lines(
        row(("gpt", "w2"), ("human", "w3"), ("bing", "w4")),
        row(("system", "w5"), ("gpt", "w2"), ("human", "w3"), ("gpt", "w4")),
        row(("gpt", "w2")),
        row(),
    )
    told: list[str] = []
    data = read_data(path, told.append)
    roles = [[m.role for m in prompt.messages] for prompt in data.prompts]
    assert roles == [["user", "assistant"], ["system", "user", "assistant"]]
    assert told == [
        f"{path}: 2 of 4 conversations are left out: no user speaks in them"
    ]


def test_what_is_said_before_a_user_speaks_is_no_answer(
    target: Callable[..., LanguageModel], write_lines: Callable[..., Path]
) -> None:
    greeting = {"role": "assistant", "content": "w9 w9"}
    (prompt,) = read_data(write_lines({"messages": [greeting, *TALK]})).prompts
    (plain,) = read_data(write_lines({"messages": TALK}, name="plain.jsonl")).prompts
    model = target()
    greeted = encode_conversation(model, prompt, 1000)
    example = encode_conversation(model, plain, 1000)
    assert greeted is not None
    assert example is not None
    assert len(greeted.spans) == len(example.spans)
    first = [one.tokens[slice(*one.spans[0])] for one in (greeted, example)]
    assert first[0] == first[1]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"conversations": "hello"}, "must be a list of turns"),
        ({"conversations": []}, "1 of 1 conversations are left out: no user"),
        ({"conversations": [{"from": "human"}]}, "needs 'from' and 'value'"),
        ({"conversations": ["hello"]}, "needs 'from' and 'value'"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "got 'cat'"),
        ({"prompt": 3}, "line 1"),
        ({"messages": TALK, "prompt": "x"}, "got 'prompt' and 'messages'"),
    ],
)
def test_bad_data_is_named(
    write_lines: Callable[..., Path], row: object, problem: str
) -> None:
    with pytest.raises(WorkloadError, match=problem):
        read_data(write_lines(row))


def test_a_file_that_is_not_there_or_not_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="can't read the workload"):
        read_data(tmp_path / "none.jsonl")
    (tmp_path / "bad.json").write_text('[{"conversations": ')
    with pytest.raises(WorkloadError, match="not JSON"):
        read_data(tmp_path / "bad.json")


def test_some_answered_and_some_not_is_an_error(
    write_lines: Callable[..., Path],
) -> None:
    data = read_data(write_lines({"messages": TALK}, {"messages": TALK[:3]}))
    with pytest.raises(WorkloadError, match=r"got 1 of 2.*--answers self"):
        with_answers(data)
