"""Under which keys a tuning run keeps the JSON records that are read outside tuning.

``usage``          how it was asked for: an object of options
``mix``            ``{class: prompts}`` of the whole workload, also those not measured
``confirm/CLASS``  speeds on held-out prompts: ``{"prompts": {prompt: {setting: [tokens
                   per second, one for each repeat]}}, ...}``; a setting is
                   ``[method, parameters]`` as JSON
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

USAGE = "usage"
MIX = "mix"


def confirmed_key(prompt_class: str) -> str:
    """Of the speeds and acceptance of what was confirmed."""
    return f"confirm/{prompt_class}"


def answers_of(confirmed: Mapping[str, Any] | None, method: str) -> int:
    """How many answers of ``method`` a record of what was confirmed holds, each repeat
    of a prompt counted; 0 where none is kept."""
    prompts = (confirmed or {}).get("prompts") or {}
    return sum(
        len(speeds)
        for settings in prompts.values()
        for key, speeds in settings.items()
        if json.loads(key)[0] == method
    )
