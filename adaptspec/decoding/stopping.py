"""Where the output ends: ends of sequence, stop strings, transformers' criteria."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from transformers import MaxTimeCriteria

from adaptspec.errors import UnsupportedControlError
from adaptspec.token_ids import Continuation, GrowingTensor

if TYPE_CHECKING:
    from adaptspec.decoding.controls import Controls
    from adaptspec.decoding.prepared import Prepared
    from adaptspec.model.language_model import LanguageModel

End = Literal["eos", "stop", "time"]


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
        prepared = controls.prepared
        asks = prepared is not None and len(prepared.criteria) > 0
        self._criteria = _Criteria(prepared) if prepared and asks else None

    def __call__(self, ids: Sequence[int], prompt: int) -> End | None:
        """Why the last of ``ids`` ends the output that began at ``prompt``, or None.

        Transformers' criteria are asked once about each token, whatever the others say,
        as ``generate`` asks them.
        """
        told = None if self._criteria is None else self._criteria(ids)
        if ids[-1] in self._eos:
            return "eos"
        if told is not None or not self._stops:
            return told
        tail = ids[max(prompt, len(ids) - self._tail) :]
        text = self._model.decode(tail, skip_special=False)
        return "stop" if any(stop in text for stop in self._stops) else None


class _Criteria:
    """Transformers' criteria over one row that grows and is never taken back.

    What was said of a token is kept, so that each criterion is asked once about it.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._past = GrowingTensor(prepared.device, prepared.padding)
        self._asked = 0  # ids, the prompt's among them
        self._end: tuple[int, End] | None = None  # how many ids there were, and why

    def __call__(self, ids: Sequence[int]) -> End | None:
        if len(ids) > self._asked:
            self._asked = len(ids)
            if (why := self._ask(ids)) is not None:
                self._end = len(ids), why
        if self._end is None or self._end[0] != len(ids):
            return None
        return self._end[1]

    def _ask(self, ids: Sequence[int]) -> End | None:
        past = ids if isinstance(ids, Continuation) else Continuation(ids, ())
        tensor = self._past.of(past)
        recorded = self._prepared.recorded
        scores = tuple(recorded.scores) if recorded.keep_scores else None
        why: End | None = None
        for criterion in self._prepared.criteria:
            if bool(torch.as_tensor(criterion(tensor, scores)).all()):
                why = "time" if type(criterion) is MaxTimeCriteria else why or "stop"
        return why
