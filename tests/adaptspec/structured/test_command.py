"""``adaptspec generate`` with a schema, a regular expression or a grammar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance")

import adaptspec_plugins
from adaptspec import cli
from adaptspec.host import Host
from speakers import json_tokenizer, speaker

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    source: Any = speaker().source
    source.save_pretrained(folder)
    json_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """What a command with these arguments prints, and on which stream."""
    host = Host({"bundled": adaptspec_plugins})
    monkeypatch.setattr(Host, "installed", classmethod(lambda cls: host))

    def run(*arguments: str) -> tuple[str, str]:
        asked = ["generate", "-m", str(model), "-s", "prompt_lookup", "--raw"]
        with pytest.raises(SystemExit):
            cli.main([*asked, "-t", "0", "-n", "120", "status", *arguments])
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


@pytest.mark.slow
def test_the_output_is_what_was_asked_for(text: Any, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "list.gbnf"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text('root ::= "- " [a-c] "\\n"')
    by_file, _ = text("--json-schema", str(schema))
    assert set(json.loads(by_file)) == {"ok"}
    by_control, _ = text("-c", "json_schema", json.dumps(SCHEMA))
    assert by_control == by_file
    assert text("--regex", "yes|no")[0] in ("yes\n", "no\n")
    assert text("--grammar", str(grammar))[0] in ("- a\n\n", "- b\n\n", "- c\n\n")


@pytest.mark.slow
def test_what_is_wrong_is_said_in_one_line(text: Any, tmp_path: Path) -> None:
    bad, gone = tmp_path / "bad.json", tmp_path / "gone.json"
    bad.write_text('{"properties": {"a": {"format": "nope", "type": "string"}}}')
    for arguments, said in (
        (("--json-schema", str(bad)), "json_schema at /properties/a: Unknown format"),
        (("--json-schema", str(gone)), f"--json-schema: {gone} can't be read: No such"),
        (("--regex", "("), "regex '(', character 1: unclosed group"),
        (("--regex", "a", "-c", "grammar", "b"), "one of json_schema, regex, grammar"),
        (("--regex", "a", "-c", "regex", "b"), "--control regex: its own option"),
    ):
        printed, errors = text(*arguments)
        assert printed == ""
        [line] = [one for one in errors.splitlines() if one.startswith("Error")]
        assert said in line
