"""The router's table: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.errors import RoutingError
from adaptspec.router.table import RouteTable, read_table, table_text
from classifiers import by_hand

SERVERS = {"ngram": "http://127.0.0.1:8001", "plain": ["http://a", "https://b:1/x"]}
TABLE = {"servers": SERVERS, "classes": {"code": "ngram"}, "default": "plain"}


def read(tmp_path: Path, text: str, name: str = "table.yaml") -> RouteTable:
    path = tmp_path / name
    path.write_text(text)
    return read_table(path)


@pytest.mark.parametrize("name", ["table.json", "table.yaml", "table.yml", "table"])
def test_a_written_table_is_read_as_it_was(tmp_path: Path, name: str) -> None:
    table = {**TABLE, "classifier": by_hand().as_json(), "fallback": False}
    found = read(tmp_path, table_text(table, Path(name)), name)
    assert found.servers == {
        "ngram": ["http://127.0.0.1:8001"],
        "plain": SERVERS["plain"],
    }
    assert found.classes == {"code": "ngram"}
    assert found.default == "plain"
    assert found.fallback is False
    assert found.teller is not None
    assert list(found.teller.names) == ["short", "long"]


@given(
    st.dictionaries(st.text(min_size=1), st.sampled_from(["ngram", "plain"])),
    st.sampled_from(["ngram", "plain"]),
    st.text(),
)
def test_a_class_has_the_server_of_the_table_and_any_other_the_default(
    classes: dict[str, str], default: str, asked: str
) -> None:
    table = RouteTable.model_validate(
        {"servers": SERVERS, "classes": classes, "default": default}
    )
    assert table.server_of(asked) == classes.get(asked, default)
    assert table.server_of(None) == default
    assert {name: table.server_of(name) for name in classes} == classes


def test_the_path_of_the_api_is_no_part_of_a_servers_address(tmp_path: Path) -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        found = read(tmp_path, json.dumps({"servers": {"a": url}, "default": "a"}))
        assert found.servers == {"a": ["http://h:1"]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"servers": {}}, "servers"),
        ({"servers": {"ngram": [], "plain": "http://a"}}, "servers.ngram"),
        ({"servers": {"ngram": "127.0.0.1:8001", "plain": "http://a"}}, "http://127"),
        ({"servers": {"ngram": "http://u:p@h", "plain": "http://a"}}, "http://127"),
        ({"servers": {"ngram": "http://h:99999", "plain": "http://a"}}, "http://127"),
        ({"servers": {"ngram": "http://h?x=1", "plain": "http://a"}}, "http://127"),
        ({"servers": {"ngram": "http://h\n/", "plain": "http://a"}}, "http://127"),
        ({"servers": {"a b": "http://h", "plain": "http://a"}}, "letters"),
        ({"classes": {"code": "fast"}}, "class 'code': no server 'fast'"),
        ({"classes": {"": "plain"}}, "classes"),
        ({"classes": ["code"]}, "classes"),
        ({"default": "fast"}, "default: no server 'fast'; there are: ngram, plain"),
        ({"default": None}, "default"),
        ({"fallback": "sometimes"}, "fallback"),
        ({"classifier": {"format": 1}}, "run tune again"),
        ({"classifier": [1]}, "classifier"),
        ({"ports": [1]}, "ports: a table has no such key; it has: servers"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(RoutingError) as refused:
        read(tmp_path, json.dumps({**TABLE, **change}))
    assert told in str(refused.value)
    assert str(tmp_path / "table.yaml") in str(refused.value)
    assert "\n" not in str(refused.value)


DEEP = '{"a":' * 100_000


@pytest.mark.parametrize("text", ["", "[1", "- 1", "text", "a: b: c", "\x00", DEEP])
@pytest.mark.parametrize("name", ["table.json", "table.yaml"])
def test_a_file_that_holds_no_table_is_refused_in_one_line(
    tmp_path: Path, text: str, name: str
) -> None:
    with pytest.raises(RoutingError, match="a table must be") as refused:
        read(tmp_path, text, name)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_told_with_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(RoutingError, match="adaptspec export --for ENGINE --split"):
        read_table(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"default": "\xe9"}')
    with pytest.raises(RoutingError, match="UTF-8"):
        read_table(tmp_path / "latin.json")


def test_only_classes_of_the_table_and_of_its_classifier_are_known() -> None:
    table = RouteTable.model_validate({**TABLE, "classifier": by_hand().as_json()})
    assert table.known_classes == {"code", "short", "long"}
