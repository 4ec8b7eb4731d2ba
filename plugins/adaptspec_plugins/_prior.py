"""What drafters' evidence was worth elsewhere, where nothing is known here yet.

``_prior.json`` was counted while decoding real text, see docs/strategies/hybrid.md.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files


@functools.cache
def shipped() -> Mapping[str, Mapping[int, Sequence[float]]]:
    """Member -> evidence -> accepted and seen."""
    stored = json.loads(files(__package__).joinpath("_prior.json").read_text("utf-8"))
    return {
        name: {int(evidence): pair for evidence, pair in counts.items()}
        for name, counts in stored["counts"].items()
    }
