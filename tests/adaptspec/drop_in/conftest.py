"""A tiny model's folder, for tests of exported directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptspec.testing.fakes import tiny_module, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with random weights and its tokenizer."""
    folder: Path = tmp_path_factory.mktemp("model")
    tiny_module("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
