"""The bundled plugin: light, so that its hooks import torch only when called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adaptspec.hookspecs import hookimpl

if TYPE_CHECKING:
    from adaptspec.engines.inference_engine import InferenceEngine
    from adaptspec.heads.protocol import TrainedHeads
    from adaptspec.model.language_model import LanguageModel
    from adaptspec.strategy import Baseline, Strategy


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    """Plain decoding, free drafters, drafts of a model, and the mixture of them."""
    from adaptspec_plugins.autoregressive import Autoregressive
    from adaptspec_plugins.draft.chain import DraftModel
    from adaptspec_plugins.draft.tree import DraftTree
    from adaptspec_plugins.hybrid.strategy import Hybrid
    from adaptspec_plugins.lookahead import Lookahead
    from adaptspec_plugins.medusa.strategy import Medusa, MedusaTypical
    from adaptspec_plugins.prompt_lookup import PromptLookup
    from adaptspec_plugins.suffix.strategy import Suffix
    from adaptspec_plugins.token_recycling.strategy import TokenRecycling
    from adaptspec_plugins.universal_draft.strategy import UniversalDraft

    return [
        Autoregressive,
        PromptLookup,
        Suffix,
        TokenRecycling,
        Lookahead,
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
    from adaptspec_plugins.baselines.huggingface import (
        HFAssisted,
        HFGenerate,
        HFPromptLookup,
    )

    return [HFGenerate, HFAssisted, HFPromptLookup]


@hookimpl
def register_engines() -> list[type[InferenceEngine]]:
    """This program's own decoding, Hugging Face's, llama.cpp, vLLM, any server's."""
    from adaptspec_plugins.engines.llama_cpp.engine import LlamaCpp
    from adaptspec_plugins.engines.openai_server import OpenAIServer
    from adaptspec_plugins.engines.ours import AdaptSpecEngine
    from adaptspec_plugins.engines.transformers import TransformersEngine
    from adaptspec_plugins.engines.vllm.engine import VLLM

    return [AdaptSpecEngine, TransformersEngine, LlamaCpp, VLLM, OpenAIServer]


@hookimpl
def open_heads(path: Path, model: LanguageModel) -> TrainedHeads | None:
    """Medusa's, in any layout."""
    from adaptspec.heads.attached import open_medusa

    return open_medusa(path, model)
