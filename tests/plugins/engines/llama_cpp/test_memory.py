"""What is refused for want of memory, and what a server that found too little tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from adaptspec.errors import EngineError
from adaptspec.workloads import Prompt
from adaptspec_plugins.engines.llama_cpp.engine import LlamaCpp
from gguf_files import write_gguf

pytestmark = pytest.mark.slow

OpenEngine = Callable[..., LlamaCpp]
PLAIN = "autoregressive"
TEXT = Prompt("t", text="abc", raw=True)


def large_model(path: Path, **more: int) -> str:
    """A model whose longest context takes a GiB for each slot."""
    numbers: dict[str, Any] = {
        **{"block_count": 8, "embedding_length": 1024, "context_length": 1 << 15},
        **{"attention__head_count": 8, "attention__head_count_kv": 8},
    }
    return str(write_gguf(path, **{**numbers, **more}))


@pytest.mark.parametrize(
    ("more", "options", "fits"),
    [
        ({}, {}, False),
        ({"attention__head_count_kv": 2}, {}, True),
        ({"attention__head_count_kv": 2}, {"concurrency": 4}, False),
        ({"attention__sliding_window": 512}, {}, True),  # it takes less; unknown what
        ({}, {"context": 300}, True),
        ({}, {"arguments": ["--chat-template-file", "f"]}, True),
    ],
)
def test_a_context_that_never_fits_is_refused_before_the_start(
    more: dict[str, int],
    options: dict[str, Any],
    fits: bool,
    open_engine: OpenEngine,
    fake: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Memory:
        available = 1 << 30
        total = 4 << 30

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    model = large_model(tmp_path / "large.gguf", **more)
    engine = open_engine(**{"model": model, "context": None, **options})
    if fits:
        assert engine.answer(PLAIN, {}, [TEXT], 1)
        return
    says = r"x 32768 tokens, .* of 1\.5 GiB .*, and 1\.0 GiB .* by --context"
    with pytest.raises(EngineError, match=says):
        engine.answer(PLAIN, {}, [TEXT], 1)
    assert fake.starts == []


def test_what_llama_cpp_makes_fit_is_not_refused(
    open_engine: OpenEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 1 << 30
        total = 3 << 29

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    engine = open_engine(model=large_model(tmp_path / "large.gguf"), context=None)
    program = engine._program
    engine._program = replace(program, options=program.options | {"--fit"})
    assert engine.answer(PLAIN, {}, [TEXT], 1)


def test_a_server_killed_beside_others_is_started_again_alone(
    open_engine: OpenEngine, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plenty:
        available = 1 << 50

    monkeypatch.setattr(psutil, "virtual_memory", Plenty)
    monkeypatch.setenv("FAKE_LLAMA_ALONE", "1")
    engine = open_engine()
    assert engine.room > 1
    engine.answer(PLAIN, {}, [TEXT], 1)
    assert engine.answer("ngram_simple", {}, [TEXT], 1)
    assert [psutil.pid_exists(pid) for pid, _ in fake.starts] == [False, False, True]
    # No other is tried beside one from now on.
    assert engine.room == 1
    engine.answer(PLAIN, {}, [TEXT], 1)
    assert len(fake.starts) == 4


def test_a_start_that_fails_for_another_reason_leaves_the_others(
    open_engine: OpenEngine, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    engine.answer(PLAIN, {}, [TEXT], 1)
    monkeypatch.setattr(LlamaCpp, "room", 2)
    monkeypatch.setenv("FAKE_LLAMA_CANT_LOAD", "a bad file")
    with pytest.raises(EngineError, match="a bad file"):
        engine.answer("ngram_simple", {}, [TEXT], 1)
    assert len(fake.starts) == 2
    assert psutil.pid_exists(fake.starts[0][0])


@pytest.mark.parametrize(
    ("context", "says"),
    [(None, "with its answer by --context"), (300, "a shorter --context, fewer")],
)
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DIE", "SIGKILL"),
        ("CANT_LOAD", "failed to allocate buffer for kv cache"),
        ("CANT_LOAD", "ggml_aligned_malloc: insufficient memory"),
    ],
)
def test_a_start_that_finds_too_little_memory_tells_the_way_out(
    context: int | None,
    says: str,
    variable: str,
    value: str,
    open_engine: OpenEngine,
    fake: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(f"FAKE_LLAMA_{variable}", value)
    with pytest.raises(EngineError, match=f"^llama-server ended.*; .*{says}"):
        open_engine(context=context).answer(PLAIN, {}, [TEXT], 1)
    assert len(fake.starts) == 1
