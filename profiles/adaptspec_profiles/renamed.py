"""Parameters as earlier releases stored them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Strategy -> name before step m003 and export format 2 -> name since.
RENAMED: Mapping[str, Mapping[str, str]] = {
    "draft_model": {"k": "draft_length", "draft_law": "draft_sampling"},
    "draft_tree": {"nodes": "draft_length", "depth": "speculation_depth"},
    "hybrid": {"max_nodes": "draft_length"},
    "medusa": {"nodes": "draft_length"},
    "medusa_typical": {"nodes": "draft_length"},
    "prompt_lookup": {"num_tokens": "draft_length"},
    "suffix": {"max_tokens": "draft_length"},
    "token_recycling": {"nodes": "draft_length", "k": "successors"},
    "universal_draft": {"k": "draft_length"},
}


def renamed(strategy: object, params: Any) -> Any:
    """A setting's parameters under the names of today; anything else as it is."""
    names = RENAMED.get(strategy, {}) if isinstance(strategy, str) else {}
    if not isinstance(params, Mapping):
        return params
    return {names.get(name, name): value for name, value in params.items()}


def without_gate(strategy: object, params: Any) -> Any:
    """A setting's parameters without the switch ``gate``, which step m004 drops."""
    if not isinstance(params, Mapping):
        return params
    return {
        name: value
        for name, value in params.items()
        if not (name == "gate" and isinstance(value, bool))
    }
