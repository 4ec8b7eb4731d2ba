"""Workload files are read strictly, and split the same way whatever their order."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.errors import WorkloadError
from adaptspec.workloads import (
    Message,
    Prompt,
    Workload,
    example_workload,
    read_workload,
    split,
)


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(WorkloadError) as caught:
        read_workload(path)
    return str(caught.value)


workloads = st.lists(
    st.tuples(st.text(max_size=6), st.sampled_from(["chat", "code", "json"])),
    min_size=1,
    max_size=40,
    unique_by=lambda pair: pair[0],
).map(
    lambda pairs: Workload(
        "drawn", tuple(Prompt(id, kind, text=f"say {id}") for id, kind in pairs)
    )
)


def test_a_line_gives_its_prompt_class_id_and_length(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "Say hi"},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
            ],
            "class": "chat",
            "id": "greeting",
            "max_new_tokens": 9,
        },
        {"prompt": "Count", "id": 40, "raw": True},
    ]
    path = written(tmp_path, "\n".join(json.dumps(line) for line in lines))

    workload = read_workload(path)

    assert workload.name == "prompts"
    assert workload.prompts == (
        Prompt("1", "default", text="Say hi"),
        Prompt(
            "greeting",
            "chat",
            messages=(Message("system", "Be brief."), Message("user", "Hi")),
            max_new_tokens=9,
        ),
        Prompt("40", "default", text="Count", raw=True),
    )
    assert [p.content for p in workload.prompts] == [
        "Say hi",
        lines[1]["messages"],
        "Count",
    ]


def test_a_workload_can_be_read_without_the_chat_template(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}',
    )
    workload = read_workload(path)
    assert [p.raw for p in workload.prompts] == [False, False]
    raw = workload.as_raw()
    assert [p.raw for p in raw.prompts] == [True, False]
    assert raw.digest != workload.digest


def test_bom_crlf_blank_lines_and_line_separators_in_text_do_no_harm(
    tmp_path: Path,
) -> None:
    path = written(
        tmp_path, '\ufeff{"prompt": "a\u2028b"}\r\n\r\n{"prompt": "é"}\r\n'.encode()
    )
    prompts = read_workload(path).prompts
    assert [(p.id, p.text) for p in prompts] == [("1", "a\u2028b"), ("3", "é")]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"prompt": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5_000, "not JSON"),
        ('["a"]', r"must be a JSON object, got \['a'\]"),
        ("{}", "one of 'prompt', 'messages', .* must be given, got none in \\[\\]"),
        (
            '{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}',
            "must be given, got 'prompt' and 'messages'",
        ),
        ('{"prompt": ""}', "'prompt' .* at least 1 character"),
        ('{"prompt": 7}', "'prompt' should be a valid string, got 7"),
        (r'{"prompt": "\ud800"}', r"'prompt' .* unicode .* got '\\ud800'"),
        (
            '{"prompt": "a", "category": "*"}',
            r"'category' must not be '\*', which is all",
        ),
        ('{"prompt": "a", "class": ""}', "'class' .* at least 1 character"),
        (r'{"prompt": "a", "class": "a\nb"}', r"control .* got 'a\\nb'"),
        (r'{"prompt": "a", "class": "\u001b[1m"}', r"control .* got '\\x1b\[1m'"),
        ('{"prompt": "a", "id": 1.5}', "'id' should be a valid string, got 1.5;"),
        ('{"prompt": "a", "max_new_tokens": 0}', "'max_new_tokens' .* got 0"),
        ('{"prompt": "a", "max_new_tokens": true}', "'max_new_tokens' .* got True"),
        ('{"prompt": "a", "max_new_tokens": "9"}', "'max_new_tokens' .* got '9'"),
        ('{"prompt": "a", "raw": 1}', "'raw' .* got 1"),
        (
            '{"raw": true, "messages": [{"role": "user", "content": "b"}]}',
            "'raw' is for a 'prompt'",
        ),
        ('{"messages": []}', "'messages' .* at least 1 item"),
        ('{"messages": "hi"}', "'messages' should be a valid list, got 'hi'"),
        ('{"messages": [{"role": "user"}]}', "'messages.0.content' is missing"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "'messages.0.content': only text parts can be read, got one of type 'image",
        ),
        ('{"body": "hi"}', "'body' must be an object, got 'hi'"),
        ('{"body": {"model": "m"}}', "'body.messages', .* must be given, got none"),
        ('{"body": {"messages": 3}}', "'body.messages' should be a valid list, got 3"),
        (
            '{"body": {"prompt": "a", "max_tokens": 0}}',
            "'body.max_tokens' .* got 0",
        ),
        ('{"custom_id": [], "prompt": "a"}', "'custom_id' .* got \\[\\]"),
        ('{"turns": "hi"}', "'turns' must be a list of texts, .* got 'hi'"),
        ('{"turns": []}', "'turns' must be a list of texts"),
        ('{"turns": ["a"], "category": 3}', "'category' should be a valid string"),
        ('{"instruction": "a", "input": 3}', "'input' should be a valid string, got 3"),
        ('{"conversations": [{"from": "cat", "value": ""}]}', "'from' must be one of"),
        ('{"conversations": [{"from": "human"}]}', "needs 'from' and 'value'"),
        ('{"prompt": "a", "tools": "x"}', "'tools' should be a valid list, got 'x'"),
    ],
)
def test_a_bad_line_is_named_by_file_number_fault_and_way_out(
    tmp_path: Path, line: str, wrong: str
) -> None:
    path = written(tmp_path, '{"prompt": "good"}\n' + line)
    message = refusal(path)
    assert message.startswith(f"{path}, line 2: ")
    assert re.search(wrong, message), message
    assert "; write {" in message
    assert len(message) - len(str(path)) < 300


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, b'{"prompt": "fine"}\n{"prompt": "caf\xe9"}\n')
    message = refusal(path)
    assert f"{path}, line 2: not UTF-8 at byte 16 " in message
    assert "save the file as UTF-8" in message


@pytest.mark.parametrize(
    "lines",
    [
        '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}',
        '{"prompt": "a", "id": "2"}\n{"prompt": "b"}',
        '{"prompt": "a", "id": 5}\n{"prompt": "b", "id": "5"}',
    ],
)
def test_an_id_used_twice_is_refused_with_both_lines(
    tmp_path: Path, lines: str
) -> None:
    message = refusal(written(tmp_path, lines))
    assert "line 2: id " in message
    assert "is line 1's already" in message


@pytest.mark.parametrize("content", ["", "\n\r\n  \n", "\ufeff"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str) -> None:
    assert "at least one prompt" in refusal(written(tmp_path, content))


def test_keys_that_nothing_reads_are_told_once_with_how_often(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a", "score": 1, "audio": None}]}
    rows = [
        {"prompt": "a", "clas": "x"},
        {"prompt": "b", "clas": "y", "note": 2, "empty": None},
        chat,
        {"body": {**chat, "temperature": 1, "model": "m"}, "method": "POST"},
    ]
    path = written(tmp_path, "\n".join(json.dumps(row) for row in rows))
    workload = read_workload(path)
    assert len(workload.prompts) == 4
    (note,) = workload.notes
    told = dict(re.findall(r"([\w.]+) \((\d)\)", note))
    assert told == {
        "clas": "2",
        "note": "1",
        "messages.score": "1",
        "body.messages.score": "1",
        "body.temperature": "1",
    }
    assert read_workload(written(tmp_path, '{"prompt": "a"}')).notes == ()


def test_an_array_is_read_like_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"instruction": "b"}]
    path = written(tmp_path, "\n" + json.dumps(rows, indent=1))
    workload = read_workload(path)
    assert [(p.id, p.text) for p in workload.prompts] == [("1", "a"), ("2", "b")]
    assert workload.prompts[1].where == f"{path}, item 2"
    assert "item 2: one of 'prompt'" in refusal(
        written(tmp_path, '[{"prompt":"a"},{}]')
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"prompt": "a"},\n {"prompt": }]', "line 2: not JSON (Expecting value at"),
        (b'[\n{"prompt": "a"},\n {"prompt": "\xe9"}]', "line 3: not UTF-8 at byte 14 "),
        (b'["a"]\n{"prompt": "b"}', "line 1: must be a JSON object"),
    ],
)
def test_a_fault_in_an_array_is_named_by_its_line(
    tmp_path: Path, content: bytes, said: str
) -> None:
    assert said in refusal(written(tmp_path, content))


def test_a_packed_file_is_read_like_the_file(tmp_path: Path) -> None:
    plain, packed = tmp_path / "mine.jsonl", tmp_path / "mine.jsonl.gz"
    content = b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\n'
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    assert read_workload(packed).digest == read_workload(plain).digest
    for broken in (gzip.compress(content)[:-9], b"\x1f\x8bmore"):
        packed.write_bytes(broken)
        with pytest.raises(
            WorkloadError, match=r"mine.jsonl.gz: .*; give a whole gzip"
        ):
            read_workload(packed)


def test_standard_input_is_read_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'{"prompt": "caf\xc3\xa9"}\n{"prompt": ""}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))
    workload = read_workload(Path("-"), skip_bad=True)
    assert workload.name == "stdin"
    assert [(p.text, p.where) for p in workload.prompts] == [
        ("caf\u00e9", "standard input, line 1")
    ]
    assert workload.skipped[0].startswith("standard input, line 2: 'prompt'")


def test_tools_are_part_of_the_prompt_and_its_digest(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}]}
    plain = read_workload(written(tmp_path, json.dumps(row)))
    tool = {"type": "function", "function": {"name": "add"}}
    armed = read_workload(written(tmp_path, json.dumps({**row, "tools": [tool]})))
    assert armed.prompts[0].tools == (tool,)
    assert armed.digest != plain.digest
    assert len({*armed.prompts, *plain.prompts}) == 2  # hashable, and different


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.jsonl"
    assert str(path) in refusal(path)
    assert "No such file" in refusal(path)


@given(workloads, st.randoms())
def test_digest_ignores_order_and_name(workload: Workload, random: Random) -> None:
    shuffled = list(workload.prompts)
    random.shuffle(shuffled)
    assert Workload("other", tuple(shuffled)).digest == workload.digest


@pytest.mark.parametrize(
    "changed",
    [
        Prompt("2", "chat", text="Hi", max_new_tokens=8),
        Prompt("1", "code", text="Hi", max_new_tokens=8),
        Prompt("1", "chat", text="Ho", max_new_tokens=8),
        Prompt("1", "chat", messages=(Message("user", "Hi"),), max_new_tokens=8),
        Prompt("1", "chat", text="Hi"),
    ],
)
def test_digest_changes_with_anything_a_prompt_holds(changed: Prompt) -> None:
    original = Workload("w", (Prompt("1", "chat", text="Hi", max_new_tokens=8),))
    assert Workload("w", (changed,)).digest != original.digest


@given(workloads, st.integers(), st.floats(0.01, 0.99))
def test_split_is_disjoint_and_covering_within_each_class(
    workload: Workload, seed: int, fraction: float
) -> None:
    tune, held_out = split(workload, seed, fraction)
    tuned, reported = tune.by_class(), held_out.by_class()
    for name, prompts in workload.by_class().items():
        mine, theirs = set(tuned[name]), set(reported[name])
        assert mine | theirs == set(prompts)
        if len(prompts) == 1:
            assert mine == theirs
            assert name in tune.reused & held_out.reused
        else:
            assert not mine & theirs
            assert mine
            assert theirs
            assert name not in tune.reused | held_out.reused
            assert abs(len(mine) - fraction * len(prompts)) <= 1


@given(workloads, st.integers(), st.randoms())
def test_split_is_stable_under_reordering(
    workload: Workload, seed: int, random: Random
) -> None:
    shuffled = list(workload.prompts)
    random.shuffle(shuffled)
    before = split(workload, seed)
    after = split(Workload("w", tuple(shuffled)), seed)
    assert [set(side.prompts) for side in before] == [
        set(side.prompts) for side in after
    ]


def test_another_seed_gives_another_split() -> None:
    workload = Workload("w", tuple(Prompt(str(i), text="x") for i in range(40)))
    sides = {frozenset(split(workload, seed)[0].prompts) for seed in range(20)}
    assert len(sides) == 20


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_fraction_that_leaves_a_side_empty_is_refused(fraction: float) -> None:
    with pytest.raises(WorkloadError, match="0 < tune_fraction < 1 must hold"):
        split(Workload("w", (Prompt("1", text="x"),)), 0, fraction)


@given(workloads, st.integers(1, 50))
def test_a_limit_takes_from_the_classes_in_turn(workload: Workload, count: int) -> None:
    limited = workload.limit(count)
    assert len(limited.prompts) == min(count, len(workload.prompts))
    whole = Counter(p.prompt_class for p in workload.prompts)
    taken = Counter(p.prompt_class for p in limited.prompts)
    for name in whole:
        if taken[name] < whole[name]:  # cut short: nobody else got two more
            assert all(taken[other] <= taken[name] + 1 for other in whole)
        first = workload.by_class()[name][: taken[name]]
        assert limited.by_class().get(name, ()) == first


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(WorkloadError, match="got 0"):
        Workload("w", (Prompt("1", text="x"),)).limit(0)


def test_the_example_workload_has_8_prompts_in_each_of_at_least_6_classes() -> None:
    workload = example_workload()
    sizes = {name: len(prompts) for name, prompts in workload.by_class().items()}
    assert len(sizes) >= 6
    assert {"code_edit", "json"} <= set(sizes)
    assert min(sizes.values()) >= 8
    assert len({json.dumps(p.content) for p in workload.prompts}) == sum(sizes.values())
    lengths = [p.max_new_tokens for p in workload.prompts if p.max_new_tokens]
    assert len(lengths) == len(workload.prompts)
    assert 48 <= min(lengths) <= max(lengths) <= 128
