"""What is told to be typed next works as it is typed."""

from __future__ import annotations

import json
import shlex
import subprocess
from inspect import signature
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adaptspec
from adaptspec.cli.generate import _controls, generate
from adaptspec_tuner.reporting.usage import PROMPT, Usage

texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8
).filter(str.strip)
usages = st.builds(
    Usage,
    model=st.none() | texts,
    draft_model=st.none() | texts,
    heads=st.lists(texts, max_size=2).map(tuple),
    dtype=st.sampled_from(["auto", "float32"]),
    device=st.sampled_from([None, "cpu"]),
    threads=st.none() | st.integers(1, 9),
    trust_remote_code=st.booleans(),
    db=st.none() | texts,
    allow_lossy=st.booleans(),
    compile=st.booleans(),
    controls=st.just({})
    | st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 2),
            "top_k": st.none() | st.integers(0, 9),
            "top_p": st.none() | st.floats(0, 1),
            "min_p": st.none() | st.floats(-1, 1),
            "bad_words_ids": st.lists(st.lists(st.integers(0, 9), min_size=1)),
            "stop_strings": st.none() | texts | st.lists(texts),
        },
    ),
)


# Fields that say nothing of our own engine.
OF_OTHER_ENGINES = (
    *("engine", "engine_command", "engine_python", "engine_argument"),
    *("context", "concurrency", "starts", "batch_threads"),
)


def test_another_engine_is_started_by_an_export_and_a_server_by_nobody() -> None:
    told = Usage("m.gguf", "-d", ("h",), engine="llama.cpp", concurrency=4, starts=True)
    assert told.export() == (
        "adaptspec export --for llama.cpp --model m.gguf --draft-model=-d --heads h "
        "--concurrency 4"
    )
    assert Usage(engine="http://x/v1").export() == ""
    told = Usage(engine="vllm", engine_argument=("--a", "b"), context=9)
    assert Usage.from_json(json.loads(json.dumps(told.as_json()))) == told


@given(usages)
def test_the_command_gives_the_shell_what_was_asked(usage: Usage) -> None:
    program, command, *arguments = shlex.split(usage.command())
    assert (program, command) == ("adaptspec", "generate")
    read = generate.make_context("generate", arguments).params
    assert read["prompt"] == PROMPT
    assert read["prompt_class"] is None
    wanted = usage.as_json()
    for key in (*OF_OTHER_ENGINES, "heads", "controls"):
        del wanted[key]
    assert {key: read[key] for key in wanted} == wanted
    assert read["heads"] == usage.heads
    named = {key: read[key] for key in ("temperature", "top_k", "top_p")}
    given = {key: value for key, value in named.items() if value is not None}
    assert {**_controls(read["control"], named), **given} == usage.controls


@given(usages)
def test_the_lines_of_python_ask_for_the_same(usage: Usage) -> None:
    asked: dict[str, Any] = {}

    class Decoder:
        def generate(self, prompt: str, **controls: Any) -> Any:
            asked.update(prompt=prompt, controls=controls)
            return type("Result", (), {"text": "text"})

    def load(model: object = None, **more: Any) -> Decoder:
        signature(adaptspec.load).bind(model, **more)
        asked.update(more, model=model)
        return Decoder()

    first, *lines = usage.python()
    assert first == "import adaptspec"
    modules = {
        "adaptspec": type("adaptspec", (), {"load": staticmethod(load)}),
        "print": lambda text: None,
    }
    exec("\n".join(lines), modules)
    assert asked.pop("prompt") == PROMPT
    asked["heads"] = tuple(asked.get("heads", ()))
    assert Usage(**asked) == usage


@given(usages)
def test_a_record_comes_back(usage: Usage) -> None:
    record = json.loads(json.dumps(usage.as_json()))
    assert Usage.from_json({**record, "of_another_version": 1}) == usage


@pytest.mark.slow
def test_a_posix_shell_reads_the_command() -> None:
    usage = Usage("it's $HOME; `x`", db="a b")
    shown = subprocess.run(
        ["sh", "-c", f'adaptspec() {{ printf "%s\\n" "$@"; }}; {usage.command()}'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.splitlines() == [
        *("generate", "--model", "it's $HOME; `x`", "--db", "a b"),
        PROMPT,
    ]


def test_the_command_of_the_embedded_model_is_short() -> None:
    assert Usage().command() == f"adaptspec generate '{PROMPT}'"
