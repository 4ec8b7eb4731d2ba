"""Every bundled strategy keeps the contract that plugin authors test against."""

from __future__ import annotations

import re
from pathlib import Path

import adaptspec_plugins
from adaptspec.testing import StrategyContract
from adaptspec_plugins.autoregressive import Autoregressive
from adaptspec_plugins.draft.chain import DraftModel
from adaptspec_plugins.draft.tree import DraftTree
from adaptspec_plugins.prompt_lookup import PromptLookup


class TestAutoregressive(StrategyContract):
    strategy = Autoregressive


class TestPromptLookup(StrategyContract):
    strategy = PromptLookup
    params = ({}, {"branches": 3, "policy": "frequent", "max_ngram": 2})


class TestDraftModel(StrategyContract):
    strategy = DraftModel
    params = ({}, {"draft_length": 6, "stop": 0.4}, {"draft_sampling": "coupled"})


class TestDraftTree(StrategyContract):
    strategy = DraftTree
    params = ({}, {"mode": "sampled", "draft_length": 8, "speculation_depth": 3})


def test_no_bundled_strategy_is_left_out() -> None:
    tests = "".join(p.read_text() for p in Path(__file__).parent.rglob("test_*.py"))
    covered = re.findall(r"\(StrategyContract\):\n    strategy = (\w+)", tests)
    bundled = {cls.__name__ for cls in adaptspec_plugins.register_strategies()}
    assert len(bundled) >= 10
    assert bundled <= set(covered)
