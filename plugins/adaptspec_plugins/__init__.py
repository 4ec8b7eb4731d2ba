"""The bundled plugin: light, so that its hooks import torch only when called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptspec.hookspecs import hookimpl

if TYPE_CHECKING:
    from adaptspec.strategy import Baseline, Strategy


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    """Plain decoding, prompt lookup, and drafts of a smaller model."""
    from adaptspec_plugins.autoregressive import Autoregressive
    from adaptspec_plugins.draft_model import DraftModel
    from adaptspec_plugins.draft_tree import DraftTree
    from adaptspec_plugins.prompt_lookup import PromptLookup

    return [Autoregressive, PromptLookup, DraftModel, DraftTree]


@hookimpl
def register_baselines() -> list[type[Baseline]]:
    """Hugging Face's own ``generate``: plain, assisted, prompt lookup."""
    from adaptspec_plugins.hf_generate import HFAssisted, HFGenerate, HFPromptLookup

    return [HFGenerate, HFAssisted, HFPromptLookup]
