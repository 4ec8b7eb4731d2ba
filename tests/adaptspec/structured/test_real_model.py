"""Real weights and a real vocabulary: JSON of SmolLM2 is what generate gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance")

from llguidance import LLMatcher

import adaptspec_plugins
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.structured.languages import JSON_LAYOUT
from adaptspec.testing.fakes import noisy_draft, tiny_model
from speakers import Theirs, generates

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "account_status": {"enum": ["active", "suspended", "deleted"]},
    },
    "required": ["name", "age", "account_status"],
    "additionalProperties": False,
}
ASKED = "Describe a made-up user of a web shop as JSON."
NEW_TOKENS = 60
STRATEGIES = (
    "autoregressive",
    "prompt_lookup",
    "suffix",
    "token_recycling",
    "lookahead",
    "hybrid",
    "draft_model",
    "draft_tree",
)


@pytest.fixture(scope="module")
def real(real_model_path: Path) -> LanguageModel:
    return load_model(real_model_path, dtype="float32")


@pytest.fixture(scope="module")
def tiny(real: LanguageModel) -> LanguageModel:
    """Random weights behind the real vocabulary, with 64 rows that no token has."""
    return tiny_model(
        "llama", tokenizer=real.tokenizer, vocab_size=real.vocab_size + 64
    )


def check(model: LanguageModel, source: LanguageModel, strategy: str) -> list[int]:
    ids = model.encode(ASKED)
    ends = model.tokenizer.eos_token_id
    theirs = Theirs(
        model, LLMatcher.grammar_from_json_schema(SCHEMA, JSON_LAYOUT), [ends]
    )
    wanted = generates(source, ids, theirs, NEW_TOKENS, [ends])
    draft = noisy_draft(model) if strategy.startswith("draft") else None
    created = Host({"bundled": adaptspec_plugins}).create(strategy, {})
    asked = Controls(NEW_TOKENS, eos_token_ids=(ends,), json_schema=SCHEMA)
    done = Engine(model, draft).generate(created, ids, asked)
    assert done.token_ids == wanted
    return done.token_ids


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_weights_emit_generates_tokens(
    strategy: str, tiny: LanguageModel
) -> None:
    check(tiny, tiny, strategy)


def test_smollm_answers_in_json(real: LanguageModel, real_model_path: Path) -> None:
    untouched = load_model(real_model_path, dtype="float32", accelerate=False)
    answer: Any = json.loads(real.decode(check(real, untouched, "hybrid")))
    assert list(answer) == list(SCHEMA["required"])
    assert 0 <= answer["age"] <= 120
