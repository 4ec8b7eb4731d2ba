"""Finds the fastest lossless strategy for each class of prompts, by measuring.

The function that tunes is :func:`adaptspec_tuner.tune.tune`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptspec_tuner.options import TuneOptions
    from adaptspec_tuner.reporting.result import TuneResult

__all__ = ["TuneOptions", "TuneResult"]


def __getattr__(name: str) -> Any:
    # Light: the plugin's module is imported for --help too.
    if name == "TuneOptions":
        from adaptspec_tuner.options import TuneOptions

        return TuneOptions
    if name == "TuneResult":
        from adaptspec_tuner.reporting.result import TuneResult

        return TuneResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
