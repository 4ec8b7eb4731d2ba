"""Text that a stop string ends: without it, and without ever having shown a part of it.

The token ids are what the model's own ``generate`` gives, which keeps a stop string and
whatever its last token brought behind it. Servers leave both out of the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from adaptspec.decoding.stopping import Stopping
from adaptspec.model.language_model import LanguageModel
from adaptspec.streaming.text_pieces import special_tokens


class StopText:
    """Holds back what may be the beginning of a stop string, and cuts off one.

    A stop string is looked for in text with special tokens, which what is shown leaves
    out: a part of it may be invisible.

    Args:
        model: Its tokenizer makes the text.
        stopping: What ends the output.
        prompt: A stop string may begin in it.
    """

    def __init__(
        self, model: LanguageModel, stopping: Stopping, prompt: Sequence[int] = ()
    ) -> None:
        self._model, self._stopping = model, stopping
        self._special = special_tokens(model.tokenizer)
        self._beginnings = _beginnings(stopping.strings, self._special.values())
        self._longest = max(map(len, self._beginnings), default=0)
        self._prompt = list(prompt[-stopping.tail :])
        text = model.decode(self._prompt)
        self._hidden = self._begun(text)  # what of the held text is the prompt's
        self._held = text[len(text) - self._hidden :]
        self._given = 0  # characters

    def certain(self, piece: str) -> str:
        """What can be shown once ``piece`` has come behind the pieces before."""
        text = self._held + piece
        shown = len(text) - self._begun(text)
        if not self._given:
            # A decoder may drop the space that an output begins with.
            spaced = f"{text[: self._hidden]} {text[self._hidden :]}"
            if self._begun(spaced) > len(text) - self._hidden:
                shown = 0
        self._held = text[shown:]
        hidden = min(self._hidden, shown)
        self._hidden -= hidden
        self._given += shown - hidden
        return text[hidden:shown]

    def _begun(self, text: str) -> int:
        """How many characters at the end of ``text`` may begin a stop string."""
        most = min(self._longest, len(text))
        fits = (n for n in range(most, 0, -1) if text[-n:] in self._beginnings)
        return next(fits, 0)

    def before(self, ids: Sequence[int]) -> str:
        """The text of an output that a stop string ended, up to the stop string.

        Where several end with the same token, up to the one that begins first.
        """
        text = self._model.decode(ids)
        skipped = len(self._prompt)
        whole = [*self._prompt, *ids]
        found = self._stopping.found(whole)
        if found is None:  # something else ended it
            return text
        first, at = found
        # The token in which the stop string begins, behind those that end before it.
        begun = max(
            end
            for end in range(first, len(whole))
            if len(self._raw(whole[first:end])) <= at
        )
        # Counted from its end: what is in front of a text may read differently, or not
        # at all, behind other tokens.
        length = len(self._model.decode(ids[: max(0, begun + 1 - skipped)]))
        if whole[begun] not in self._special:
            length -= len(self._raw(whole[first : begun + 1])) - at
        # A character that began in the prompt may have been shown in part.
        return text[: max(length, self._given)]

    def _raw(self, ids: Sequence[int]) -> str:
        return self._model.decode(ids, skip_special=False)


def _beginnings(stops: Sequence[str], special: Any) -> set[str]:
    """What can be seen of a stop string that isn't whole yet, in all forms."""
    special = [name for name in special if name]
    heads = {name[:size] for name in special for size in range(1, len(name))}
    tails = {name[size:] for name in special for size in range(1, len(name))}
    names = sorted(map(re.escape, special), key=len, reverse=True)
    pattern = re.compile("|".join(names)) if names else None
    found: set[str] = set()
    for stop in stops:
        for size in range(1, len(stop)):
            begun = stop[:size]
            # It may begin or break off within a special token.
            firsts = [0, *(n for n in range(1, size + 1) if begun[:n] in tails)]
            ends = [size, *(n for n in range(size) if begun[n:] in heads)]
            for first in firsts:
                for end in ends:
                    shown = begun[first:end]
                    found.add(pattern.sub("", shown) if pattern else shown)
    found.discard("")
    return found
