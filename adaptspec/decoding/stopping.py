"""Where the output ends: end-of-sequence tokens and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from adaptspec.errors import UnsupportedControlError

if TYPE_CHECKING:
    from adaptspec.decoding.controls import Controls
    from adaptspec.model.language_model import LanguageModel


class Stopping:
    """Tells after each token whether it is the last one."""

    def __init__(self, model: LanguageModel, controls: Controls) -> None:
        self._model = model
        self._eos = frozenset(controls.eos_token_ids)
        self._stops = controls.stop_strings
        if "" in self._stops:
            raise UnsupportedControlError(
                "a stop string must have at least one character, got ''; leave it out"
            )
        # Every token of a stop string's text covers at least one of its bytes, but for
        # tokens that decode to nothing, for which a few more are looked at.
        self._tail = max((len(s.encode()) for s in self._stops), default=0) + 8

    def __call__(
        self, ids: Sequence[int], prompt: int
    ) -> Literal["eos", "stop"] | None:
        """Why the last of ``ids`` ends the output that began at ``prompt``, or None."""
        if ids[-1] in self._eos:
            return "eos"
        if not self._stops:
            return None
        tail = ids[max(prompt, len(ids) - self._tail) :]
        text = self._model.decode(tail, skip_special=False)
        return "stop" if any(stop in text for stop in self._stops) else None
