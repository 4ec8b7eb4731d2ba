"""AdaptSpec: the fastest lossless decoding strategy, measured and chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptspec._version import __version__
from adaptspec.errors import AdaptSpecError

if TYPE_CHECKING:
    from adaptspec.decoder import Decoder as Decoder
    from adaptspec.decoder import load as load
    from adaptspec.drop_in.speed_up import speed_up as speed_up
    from adaptspec.hookspecs import hookimpl as hookimpl
    from adaptspec.selector import Choice as Choice
    from adaptspec.streaming.stream import Result as Result

__all__ = [
    "AdaptSpecError",
    "Choice",
    "Decoder",
    "Result",
    "__version__",
    "hookimpl",
    "load",
    "speed_up",
]

# Heavy names come when asked for: `adaptspec --help` must not wait for torch, and
# nothing is imported before the command line listens for Ctrl-C.
_LAZY = {
    "Choice": "adaptspec.selector",
    "Decoder": "adaptspec.decoder",
    "Result": "adaptspec.streaming.stream",
    "hookimpl": "adaptspec.hookspecs",
    "load": "adaptspec.decoder",
    "speed_up": "adaptspec.drop_in.speed_up",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'adaptspec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
