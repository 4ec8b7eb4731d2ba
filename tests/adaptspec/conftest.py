"""What tests of several rooms of the core share."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from adaptspec.model.cache import TreeCache
    from adaptspec.model.language_model import LanguageModel


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[TreeCache]]:
    """Every cache made from now on."""
    from adaptspec.model.language_model import LanguageModel

    made: list[weakref.ref[TreeCache]] = []
    build = LanguageModel.new_cache

    def new_cache(self: LanguageModel, capacity: int = 0) -> TreeCache:
        cache = build(self, capacity)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(LanguageModel, "new_cache", new_cache)
    return made
