"""Under which keys a tuning run keeps the JSON records that are read outside tuning.

``usage``          how it was asked for: an object of options
``defaults``       method -> its parameters' defaults, of another engine than ours
``mix``            ``{class: prompts}`` of the whole workload, also those not measured
``confirm/CLASS``  speeds on held-out prompts: ``{"prompts": {prompt: {setting: [tokens
                   per second, one for each repeat]}}, ...}``; a setting is
                   ``[method, parameters]`` as JSON
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

DEFAULTS = "defaults"
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


def from_anywhere(usage: Mapping[str, Any]) -> dict[str, Any]:
    """How a tune was asked for, with files and folders by their absolute paths.

    What is no file here, such as a name on the hub, stays as it is.
    """

    def whole(name: str) -> str:
        path = os.path.expanduser(name)
        return os.path.abspath(path) if name and os.path.exists(path) else name

    told = dict(usage)
    for key in ("model", "draft_model", "engine_command", "engine_python"):
        name = told.get(key)
        # A program's bare name is looked for on the path of programs.
        if name and ("model" in key or os.sep in name):
            told[key] = whole(name)
    told["heads"] = [whole(name) for name in told.get("heads") or ()]
    return told
