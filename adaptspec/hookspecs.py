"""The extension points: everything a plugin can add; ``docs/hooks.md`` has examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from adaptspec.engines.inference_engine import InferenceEngine
    from adaptspec.heads.protocol import TrainedHeads
    from adaptspec.model.language_model import LanguageModel
    from adaptspec.profile import ProfileStore
    from adaptspec.strategy import Baseline, Strategy

PROJECT = "adaptspec"
hookspec = pluggy.HookspecMarker(PROJECT)
# Marks a plugin's function that has one of the names below as what AdaptSpec calls.
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_strategies() -> Sequence[type[Strategy]]:  # type: ignore[empty-body]
    """Return the strategy classes this plugin brings.

    Called only when strategies are used, so import torch inside.
    """


@hookspec
def register_baselines() -> Sequence[type[Baseline]]:  # type: ignore[empty-body]
    """Return other engines' decoding to be measured beside ours."""


@hookspec
def register_engines() -> Sequence[type[InferenceEngine]]:  # type: ignore[empty-body]
    """Return inference engines that can be tuned and compared.

    Called only when engines are used.
    """


@hookspec
def register_commands(cli: click.Group) -> None:
    """Add commands to the ``adaptspec`` command line. Must not import torch."""


@hookspec(firstresult=True)
def open_profile_store(url: str | None) -> ProfileStore | None:
    """Open the profile database at ``url`` (a path or SQLAlchemy URL; None: default).

    The first plugin that returns a store wins.
    """


@hookspec(firstresult=True)
def open_heads(path: Path, model: LanguageModel) -> TrainedHeads | None:
    """Read the trained heads in the folder ``path`` for ``model``.

    Return None where they are of a kind this plugin doesn't know, and raise
    :class:`~adaptspec.errors.HeadsLoadError` where they are damaged or don't fit. The
    first plugin that returns heads wins.
    """
