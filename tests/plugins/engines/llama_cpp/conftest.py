"""The fake ``llama-server`` as a program, and what it was started with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

import fake_llama_server
from adaptspec.engines.inference_engine import EngineOptions
from adaptspec_plugins.engines.llama_cpp.engine import LlamaCpp
from gguf_files import write_gguf


@dataclass
class Fake:
    """A program to be named as the engine's, and a log of its starts."""

    command: str
    log: Path

    @property
    def starts(self) -> list[tuple[int, list[str]]]:
        """Process and arguments of each server that was started."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(pid, words) for pid, words in map(json.loads, lines)]

    @property
    def asked(self) -> list[tuple[int, int, list[int]]]:
        """Process, slot and tokens of each request for an answer."""
        lines = Path(f"{self.log}.asked").read_text().splitlines()
        return [(pid, slot, tokens) for pid, slot, tokens in map(json.loads, lines)]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    program = tmp_path / "llama-server"
    script = fake_llama_server.__file__
    program.write_text(
        f"#!{sys.executable}\nimport runpy\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    program.chmod(0o755)
    log = tmp_path / "starts"
    monkeypatch.setenv("FAKE_LLAMA_LOG", str(log))
    monkeypatch.setenv("ADAPTSPEC_CACHE", str(tmp_path / "cache"))
    return Fake(str(program), log)


OpenEngine = Callable[..., LlamaCpp]


@pytest.fixture
def open_engine(fake: Fake, tmp_path: Path) -> Iterator[OpenEngine]:
    """Opens engines of the fake program; they are closed, and leave nothing."""
    opened: list[LlamaCpp] = []
    model = write_gguf(tmp_path / "model.gguf")

    def open_one(**options: object) -> LlamaCpp:
        told = {"command": fake.command, "model": str(model), "context": 300}
        engine = LlamaCpp.open(EngineOptions(**{**told, **options}))  # type: ignore[arg-type]
        opened.append(engine)
        return engine

    yield open_one
    for engine in opened:
        engine.close()
    left = [pid for pid, _ in fake.starts if psutil.pid_exists(pid)]
    assert left == []
