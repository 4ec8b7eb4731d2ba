"""A model's tokens as llguidance sees them: bytes, and ids that end a sequence."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from adaptspec.errors import UnsupportedControlError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from adaptspec.model.forward import TextModel

# By tokenizer: reading one takes up to a second.
_known: WeakKeyDictionary[Any, dict[tuple[int, ...], Vocabulary]] = WeakKeyDictionary()
_lock = threading.Lock()


class Vocabulary:
    """What llguidance makes of one tokenizer, and the grammars compiled for it.

    Args:
        tokens: llguidance's own.
        kept: Compiled grammars kept, those used last.
    """

    def __init__(self, tokens: LLTokenizer, kept: int = 64) -> None:
        self.tokens = tokens
        self._kept = kept
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: str) -> LLMatcher:
        """A new matcher at the beginning; one in an error state says what is wrong."""
        from llguidance import LLMatcher

        with self._lock:
            template = self._compiled.get(grammar)
            if template is None:
                template = LLMatcher(self.tokens, grammar, log_level=0)
                if template.is_error():
                    return template
                self._compiled[grammar] = template
                if len(self._compiled) > self._kept:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return template.deep_copy()


def vocabulary_of(model: TextModel, ends: Sequence[int], control: str) -> Vocabulary:
    """The vocabulary of a model's tokenizer, read once.

    Args:
        ends: Ids that end a sequence. Without any, the tokenizer's own is read as one;
            the caller must not let it through.
        control: The name of the control that needs it, for errors.

    Raises:
        UnsupportedControlError: if there is no tokenizer that llguidance reads.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UnsupportedControlError(f"{control} needs the model's tokenizer")
    with _lock:
        of_tokenizer = _known.setdefault(tokenizer, {})
        key = (model.vocab_size, len(tokenizer), *ends)
        if key not in of_tokenizer:
            of_tokenizer[key] = Vocabulary(_read(model, ends, control))
        return of_tokenizer[key]


def _read(model: TextModel, ends: Sequence[int], control: str) -> LLTokenizer:
    from llguidance.hf import from_tokenizer

    size = max(model.vocab_size, len(model.tokenizer))
    try:
        return from_tokenizer(
            model.tokenizer, n_vocab=size, eos_token=list(ends) if ends else None
        )
    except Exception as error:  # whatever a tokenizer of its own code may raise
        reason = " ".join(str(error).split()) or repr(error)
        raise UnsupportedControlError(
            f"{control} needs a tokenizer that llguidance can read; that of "
            f"{model.name} ({type(model.tokenizer).__name__}) isn't: {reason}"
        ) from None
