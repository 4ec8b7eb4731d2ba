"""``adaptspec generate``: what is read, what is printed, and when."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import adaptspec_plugins
import adaptspec_profiles.plugin
from adaptspec import cli
from adaptspec.cli import texts
from adaptspec.decoder import load
from adaptspec.decoding.engine import Run
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.prompts import encode_prompt
from adaptspec.testing.fakes import tiny_module, tiny_tokenizer
from adaptspec.testing.stores import example_profile
from adaptspec_profiles import open_store
from adaptspec_profiles.memory import MemoryStore
from decided import keep

HOST = {"bundled": adaptspec_plugins, "profiles": adaptspec_profiles.plugin}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    tiny_module("llama").save_pretrained(folder)
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w9 ' + m.role + ' ' + m.content }} {% endfor %}w8"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def asked(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every prompt that is encoded."""
    found: list[Any] = []

    def encode(target: LanguageModel, prompt: Any, **given: Any) -> list[int]:
        found.append((prompt, given["raw"]))
        return encode_prompt(target, prompt, **given)

    monkeypatch.setattr("adaptspec.model.language_model.encode_prompt", encode)
    monkeypatch.setattr(Host, "installed", classmethod(lambda cls: Host(HOST)))
    monkeypatch.setattr(cli, "warnings", types.SimpleNamespace())
    for name in ("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "error" if name.startswith("TR") else "false")
    with open(os.devnull) as null:
        monkeypatch.setattr(sys, "stdin", null)
        yield found


def run(model: Path, *arguments: str, tokens: int = 5) -> int:
    given = ["-m", str(model), "--db", str(model / "p.db"), "-s", "autoregressive"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", *given, "-n", str(tokens), *arguments])
    code = ended.value.code
    return code if isinstance(code, int) else 0


def piped(data: bytes) -> io.TextIOWrapper:
    reading, writing = os.pipe()
    with open(writing, "wb") as stream:
        stream.write(data)
    return open(reading)


def filed(data: bytes, folder: Path) -> io.TextIOWrapper:
    (folder / "notes").write_bytes(data)
    return (folder / "notes").open()


@pytest.mark.parametrize("kind", ["pipe", "file", "memory"])
@pytest.mark.parametrize(
    ("given", "prompt", "expected"),
    [
        (b"w2\nw3\n", ["w5"], "w2\nw3\n\nw5"),
        (b"\n", ["w5"], "w5"),
        (b"", ["w5"], "w5"),
        (b"w2 w3\n", [], "w2 w3\n"),
        (b"w2 w3\n", ["-"], "w2 w3\n"),
        (b"\xef\xbb\xbfw2", ["-"], "w2"),
        ("w2 é\n".encode(), ["w5"], "w2 é\n\nw5"),
    ],
)
def test_what_is_piped_in_comes_before_the_prompt(
    model: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    given: bytes,
    prompt: list[str],
    expected: str,
) -> None:
    stdin: Any
    if kind == "memory":
        stdin = io.TextIOWrapper(io.BytesIO(given))
    else:
        stdin = piped(given) if kind == "pipe" else filed(given, tmp_path)
    monkeypatch.setattr(sys, "stdin", stdin)
    with stdin:
        assert run(model, *prompt) == 0
    assert asked == [(expected, False)]


@pytest.mark.slow
def test_input_that_isnt_fed_is_left_alone_beside_a_prompt(
    model: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreadable:
        def fileno(self) -> int:
            raise io.UnsupportedOperation

        def read(self) -> str:
            raise OSError("not here")

    def never(*given: Any) -> str:
        raise AssertionError("a terminal is waited for")

    assert run(model, "w5") == 0  # /dev/null
    for nothing in (None, Unreadable()):
        monkeypatch.setattr(sys, "stdin", nothing)
        assert run(model, "w5") == 0
    controller, terminal = os.openpty()
    with open(controller), open(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(texts, "_input", never)
        assert run(model, "w5") == 0
    assert asked == [("w5", False)] * 4


def test_an_open_pipe_is_waited_for_and_that_is_told(
    model: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(texts, "PATIENCE_SECONDS", 0.01)
    echo = click.echo

    def feed(*given: Any, **how: Any) -> None:
        echo(*given, **how)
        if given == (texts.WAITING,):
            os.write(writing, b"w2")
            os.close(writing)

    monkeypatch.setattr(click, "echo", feed)
    with open(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(model, "-") == 0
    assert asked == [("w2", False)]
    assert capsys.readouterr().err.splitlines()[0] == texts.WAITING


def test_beside_a_prompt_a_pipe_that_stays_open_and_empty_is_left_out(
    model: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(texts, "PATIENCE_SECONDS", 0.01)
    with open(reading) as stdin, open(writing, "w"):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(model, "w5") == 0
    assert asked == [("w5", False)]
    assert capsys.readouterr().err.splitlines()[0] == texts.LEFT_OUT


@pytest.mark.parametrize(
    ("given", "arguments", "said"),
    [
        (b"caf\xe9", [], "standard input must be UTF-8, got byte 0xe9 at 3"),
        (b"\xff\xfew\0", ["w5"], "standard input must be UTF-8, got byte 0xff at 0"),
        (b"", [], "the prompt is empty"),
        (b" \n", ["-"], "the prompt is empty"),
        (b"", [""], "the prompt is empty"),
        (b"", ["w5", "--system", "w2", "--raw"], "leave out --raw"),
        (b"", ["\udce9"], "the prompt must be UTF-8"),
        (b"", ["w5", "--stop", "\udce9"], "--stop must be UTF-8"),
        (b"", ["w5", "--top-p", "7"], "top_p must be in 0..1, got 7"),
    ],
)
def test_what_cant_be_read_is_one_line(
    model: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: bytes,
    arguments: list[str],
    said: str,
) -> None:
    with piped(given) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(model, *arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.strip().splitlines()
    assert line.startswith("Error: ")
    assert said in line


def test_command_python_and_tune_read_one_text_alike(
    model: Path, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptspec.workloads import read_workload

    seen: list[list[int]] = []

    def encode(target: LanguageModel, prompt: Any, **given: Any) -> list[int]:
        seen.append(encode_prompt(target, prompt, **given))
        return seen[-1]

    monkeypatch.setattr("adaptspec.model.language_model.encode_prompt", encode)
    lines = tmp_path / "lines.jsonl"
    decoder = load(model, db=MemoryStore())
    for raw in (False, True):
        del seen[:]
        assert run(model, "w5 w6", *(["--raw"] if raw else [])) == 0
        decoder.generate("w5 w6", raw=raw, strategy="autoregressive", max_new_tokens=2)
        lines.write_text(json.dumps({"prompt": "w5 w6", "raw": raw}))
        [line] = read_workload(lines).prompts
        seen.append(line.encode(decoder.model))
        templated = "w9 user w5 w6 w8"
        text = "w5 w6" if raw else templated
        expected = decoder.model.tokenizer(text)["input_ids"]
        assert seen == [expected] * 4


def test_a_system_message_comes_first(model: Path, asked: list[Any]) -> None:
    assert run(model, "w5", "--system", "w2") == 0
    assert asked[0][0] == [
        {"role": "system", "content": "w2"},
        {"role": "user", "content": "w5"},
    ]


def test_text_is_printed_as_it_comes(
    model: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Told(io.StringIO):
        def flush(self) -> None:
            events.append(self.getvalue())

    step = Run._step

    def told(self: Run, *given: Any) -> Any:
        events.append("step")
        return step(self, *given)

    monkeypatch.setattr(Run, "_step", told)
    monkeypatch.setattr(sys, "stdout", Told())
    assert run(model, "w5", tokens=3) == 0
    words = events[-1].split()
    assert len(words) == 3
    assert events[:5] == [
        words[0],
        "step",
        " ".join(words[:2]),
        "step",
        " ".join(words),
    ]


@pytest.mark.slow
def test_stops_sampling_and_threads_are_passed_on(
    model: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(model, "w5", "--json", tokens=12) == 0
    whole = json.loads(capsys.readouterr().out)
    words = whole["text"].split()
    chosen = ["--stop", "nothing", "--stop", words[3], "--device", "cpu"]
    assert run(model, "w5", "--json", *chosen, tokens=12) == 0
    cut = json.loads(capsys.readouterr().out)
    assert cut["finish"] == "stop"
    assert cut["text"].split() == words[: words.index(words[3])]
    assert run(model, "w5", "--json", "-t", "9", "--top-k", "1", tokens=12) == 0
    assert json.loads(capsys.readouterr().out)["text"] == whole["text"]
    sampled = ["--json", "-t", "9", "--top-p", "0.0001", "--threads", "1"]
    assert run(model, "w5", *sampled, tokens=12) == 0
    assert json.loads(capsys.readouterr().out)["text"] == whole["text"]


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_is_there_and_ends_with_130(
    model: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    whole = load(model, db=MemoryStore()).generate(
        "w5", strategy="autoregressive", max_new_tokens=9
    )
    steps: list[int] = []
    step = Run._step

    def stopped(self: Run, *given: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(Run, "_step", stopped)
    assert run(model, "w5", *(["--json"] if as_json else []), tokens=9) == 130
    printed = capsys.readouterr()
    expected = " ".join(whole.text.split()[:4])
    if as_json:
        found = json.loads(printed.out)
        assert (found["text"], found["finish"]) == (expected, "unfinished")
    else:
        assert printed.out == f"{expected}\n"


def test_ctrl_c_while_loading_ends_with_130(
    model: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*given: Any, **how: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("adaptspec.decoder.load", interrupted)
    assert run(model, "w5") == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_goes_away_ends_it_quietly(
    model: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stdout = open(writing, "w")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(model, "w5") == 1
    assert capsys.readouterr().err == ""
    with contextlib.suppress(BrokenPipeError):
        stdout.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(
    model: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stdout = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(model, "w5") == 1
    with contextlib.suppress(OSError):
        stdout.close()
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "can't write to standard output: No space left" in line


@pytest.mark.slow
def test_the_c_locale_reads_and_prints_every_character() -> None:
    script = (
        "import sys\n"
        "from adaptspec.cli.texts import make_printable, prompt_with_input, write\n"
        "make_printable()\n"
        "write(prompt_with_input(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "naïve 你"],
        input="café\n".encode(),
        capture_output=True,
        check=True,
        env={
            **os.environ,
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
        },
    )
    assert done.stdout.decode() == "café\n\nnaïve 你"


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "requests"), [([], [1]), (["--no-record"], [])])
def test_what_a_request_took_is_recorded_unless_it_is_refused(
    model: Path,
    asked: list[Any],
    tmp_path: Path,
    flags: list[str],
    requests: list[int],
) -> None:
    db = str(tmp_path / "p.db")
    store = open_store(db)
    here = load(model, db=MemoryStore()).environment
    keep(store, [example_profile(environment=here, params={"draft_length": 3})])
    given = ["-m", str(model), "--db", db, "--class", "chat", *flags]
    with pytest.raises(SystemExit):
        cli.main(["generate", *given, "-n", "9", "w2 w3"])
    gc.collect()
    assert [use.requests for use in store.uses()] == requests
    store.close()
