"""A tiny model and its draft in folders, as an engine is told of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptspec.testing.fakes import tiny_module, tiny_tokenizer


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a target and a draft model."""
    folders: list[Path] = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        tiny_module("llama", seed=seed).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        folders.append(folder)
    return str(folders[0]), str(folders[1])
