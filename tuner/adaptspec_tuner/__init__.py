"""Finds the fastest lossless strategy for each class of prompts, by measuring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptspec_tuner.options import TuneOptions
    from adaptspec_tuner.reporting.result import TuneResult
    from adaptspec_tuner.tune import tune

__all__ = ["TuneOptions", "TuneResult", "tune"]


def __getattr__(name: str) -> Any:
    # Light: the plugin's module is imported for --help too.
    if name == "tune":
        from adaptspec_tuner.tune import tune

        return tune
    if name == "TuneOptions":
        from adaptspec_tuner.options import TuneOptions

        return TuneOptions
    if name == "TuneResult":
        from adaptspec_tuner.reporting.result import TuneResult

        return TuneResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
