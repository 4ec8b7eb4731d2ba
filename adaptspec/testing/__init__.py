"""For plugin authors: contracts to subclass, tiny models and fakes to test with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptspec.testing.engines import (
        InferenceEngineContract as InferenceEngineContract,
    )
    from adaptspec.testing.fakes import FakeClock as FakeClock
    from adaptspec.testing.fakes import ScriptedStrategy as ScriptedStrategy
    from adaptspec.testing.fakes import hf_greedy as hf_greedy
    from adaptspec.testing.fakes import noisy_draft as noisy_draft
    from adaptspec.testing.fakes import tiny_model as tiny_model
    from adaptspec.testing.fakes import tiny_module as tiny_module
    from adaptspec.testing.fakes import tiny_tokenizer as tiny_tokenizer
    from adaptspec.testing.stores import ProfileStoreContract as ProfileStoreContract
    from adaptspec.testing.strategies import StrategyContract as StrategyContract

# Authors of stores and engines need no torch, strategy authors no database.
_LAZY = {
    "FakeClock": "fakes",
    "InferenceEngineContract": "engines",
    "ProfileStoreContract": "stores",
    "ScriptedStrategy": "fakes",
    "StrategyContract": "strategies",
    "hf_greedy": "fakes",
    "noisy_draft": "fakes",
    "tiny_model": "fakes",
    "tiny_module": "fakes",
    "tiny_tokenizer": "fakes",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
