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
        self.tail = max((len(s.encode()) for s in self.strings), default=0) + 8

    def __call__(self, ids: Sequence[int]) -> Literal["eos", "stop"] | None:
        """Why the last of ``ids``, prompt and output, ends the output, or None."""
        if ids[-1] in self._eos:
            return "eos"
        return None if self.found(ids) is None else "stop"

    def found(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """Where a stop string begins that the last of ``ids`` completes, or None.

        It may begin in the prompt, as for the model's own ``generate``.

        Returns:
            A place in ``ids``, and how many characters behind it: of the text of the
            ids from there on, special tokens included.
        """
        if not self.strings:
            return None
        first = max(0, len(ids) - self.tail)
        text = self._model.decode(ids[first:], skip_special=False)
        if not any(stop in text for stop in self.strings):
            return None
        # What is complete before the last token isn't completed by it.
        before = self._model.decode(ids[first:-1], skip_special=False)
        known = len(before.rstrip("\N{REPLACEMENT CHARACTER}"))
        places = [
            at
            for stop in self.strings
            if (at := text.find(stop, max(0, known - len(stop) + 1))) >= 0
        ]
        return (first, min(places)) if places else None
