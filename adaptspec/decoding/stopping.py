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
        self.strings = controls.stop_strings
        if "" in self.strings:
            raise UnsupportedControlError(
                "a stop string must have at least one character, got ''; leave it out"
            )
        # Every token of a stop string's text covers at least one of its bytes, but for
        # tokens that decode to nothing, for which a few more are looked at.
        self._tail = max((len(s.encode()) for s in self.strings), default=0) + 8

    def __call__(
        self, ids: Sequence[int], prompt: int
    ) -> Literal["eos", "stop"] | None:
        """Why the last of ``ids`` ends the output that began at ``prompt``, or None."""
        if ids[-1] in self._eos:
            return "eos"
        return None if self.found(ids, prompt) is None else "stop"

    def found(self, ids: Sequence[int], prompt: int) -> tuple[int, int] | None:
        """Where a stop string begins that the last of ``ids`` completes, or None.

        Returns:
            A place in ``ids``, and how many characters behind it: of the text of the
            ids from there on, special tokens included.
        """
        if not self.strings:
            return None
        first = max(prompt, len(ids) - self._tail)
        text = self._model.decode(ids[first:], skip_special=False)
        places = [at for stop in self.strings if (at := text.find(stop)) >= 0]
        return (first, min(places)) if places else None
