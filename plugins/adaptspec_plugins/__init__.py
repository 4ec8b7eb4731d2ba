"""The bundled plugin: light, so that its hooks import torch only when called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adaptspec.hookspecs import hookimpl

if TYPE_CHECKING:
    from adaptspec.models import LanguageModel
    from adaptspec.strategy import Baseline, Strategy
    from adaptspec.trained import TrainedHeads


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    """Plain decoding, free drafters, drafts of a model, and the mixture of them."""
    from adaptspec_plugins.autoregressive import Autoregressive
    from adaptspec_plugins.draft_model import DraftModel
    from adaptspec_plugins.draft_tree import DraftTree
    from adaptspec_plugins.early_exit import EarlyExit
    from adaptspec_plugins.hybrid import Hybrid
    from adaptspec_plugins.lookahead import Lookahead
    from adaptspec_plugins.medusa import Medusa, MedusaTypical
    from adaptspec_plugins.prompt_lookup import PromptLookup
    from adaptspec_plugins.suffix import Suffix
    from adaptspec_plugins.token_recycling import TokenRecycling
    from adaptspec_plugins.universal_draft import UniversalDraft

    return [
        Autoregressive,
        PromptLookup,
        Suffix,
        TokenRecycling,
        Lookahead,
        EarlyExit,
        DraftModel,
        DraftTree,
        UniversalDraft,
        Medusa,
        MedusaTypical,
        Hybrid,
    ]


@hookimpl
def register_baselines() -> list[type[Baseline]]:
    """Hugging Face's own ``generate``: plain, assisted, prompt lookup."""
    from adaptspec_plugins.hf_generate import HFAssisted, HFGenerate, HFPromptLookup

    return [HFGenerate, HFAssisted, HFPromptLookup]


@hookimpl
def open_heads(path: Path, model: LanguageModel) -> TrainedHeads | None:
    """Medusa's, in any layout."""
    from adaptspec_plugins.heads import open_medusa

    return open_medusa(path, model)
