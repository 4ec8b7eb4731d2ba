"""One sequence's place in a grammar, kept by llguidance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from adaptspec.errors import InvalidGrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class GrammarMatcher:
    """A :class:`~adaptspec.decoding.constraint.Matcher`.

    Args:
        inner: At the beginning; of this sequence alone.
        tokens: What ``inner`` was made for.
        control: The control's name, for errors.
        endless: Whether no end of sequence is ever to come.
    """

    def __init__(
        self,
        inner: LLMatcher,
        tokens: LLTokenizer,
        control: str,
        endless: bool = False,
    ) -> None:
        self._inner, self._tokens, self._control = inner, tokens, control
        self._size, self._ends = tokens.vocab_size, list(tokens.eos_tokens)
        self._endless = endless
        self._closed = False  # by an end that `inner` wasn't told of

    def accept(self, token: int) -> bool:
        """Advance by a token if it is legal here; else stay, and say False."""
        # llguidance doesn't come back from an id that it doesn't know.
        if not 0 <= token < self._size:
            return False
        if token in self._ends and self._endless:
            return False
        if self._inner.is_stopped():  # it allows an end, but doesn't take it
            if token in self._ends and not self._has_end:
                self._closed = True
                return True
            return False
        # It takes other spellings of forced text, which its masks leave out.
        forced = self.forced()
        if forced and forced[0] != token:
            return False
        accepted = self._inner.try_consume_tokens([token]) == 1
        self._check()
        return accepted

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` accepted tokens."""
        if count and self._closed:
            self._closed = False
            count -= 1
        if count:
            self._inner.rollback(count)
            self._check()

    def allowed(self) -> torch.Tensor:
        """Which tokens are legal here: bool ``[a multiple of 8]``."""
        bits = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        self._check()  # beyond its limits it allows the end of sequence alone
        legal = torch.from_numpy(np.unpackbits(bits, bitorder="little").view(np.bool_))
        if self._endless or self._has_end:
            legal[self._ends] = False
        return legal

    def forced(self) -> list[int]:
        """The tokens of the text that must come next, as the tokenizer spells it.

        There llguidance allows no other spelling. A last token that may go on beyond
        this text is left out.
        """
        found = self._inner.compute_ff_tokens()
        self._check()
        return found

    @property
    def finished(self) -> bool:
        """Whether nothing but an end of sequence can follow."""
        return self._inner.is_stopped()

    @property
    def _has_end(self) -> bool:
        return self._closed or self._inner.stop_reason() == "EndOfSentence"

    def _check(self) -> None:
        """llguidance doesn't raise where a grammar is too much for it; this does."""
        if self._inner.is_error():
            reason = self._inner.get_error().partition("<state>")[0]
            raise InvalidGrammarError(
                f"{self._control}: it can't be followed any further: "
                f"{' '.join(reason.split())}; simplify it"
            )
