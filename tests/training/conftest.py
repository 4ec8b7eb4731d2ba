"""Tiny targets and data for training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import tiny_module, tiny_tokenizer


@pytest.fixture
def target() -> Callable[..., LanguageModel]:
    """A tiny model as training loads it: with a tokenizer, not accelerated."""

    def make(architecture: str = "llama", **overrides: Any) -> LanguageModel:
        module = tiny_module(architecture, **overrides)
        return LanguageModel(module, tiny_tokenizer(), architecture, accelerate=False)

    return make


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines."""

    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def prompts(write_lines: Callable[..., Path]) -> Path:
    """Twelve prompts of several lengths."""
    return write_lines(
        *(
            {"prompt": " ".join(f"w{(7 * i + j) % 60 + 2}" for j in range(3 + i % 5))}
            for i in range(12)
        )
    )
