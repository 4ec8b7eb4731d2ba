"""Text piece by piece while tokens come, equal in the end to the text of them all."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

CONTEXT_TOKENS = (
    8  # tokens decoded again with new ones, at least, and twice as many at most
)
LONGEST_CONTEXT = 64  # where the last tokens show nothing but white space
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# `clean_up_tokenization` looks for patterns that begin with a space, 4 characters at
# most; none reaches across a place with no space in so many characters before it.
_CLEAN_REACH = 8


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Token id -> text, of the special tokens, which a result's text leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {i: str(token.content) for i, token in added.items() if token.special}


class TextPieces:
    """Turns tokens into pieces of text that never have to be taken back.

    How a token reads may depend on its neighbours: a character may span several
    tokens, WordPiece puts spaces between words, and cleaning up removes spaces that
    stand before punctuation. Text is held back until what follows can't change it.
    A token costs the decoding of a few tokens, however long the text is.

    Args:
        tokenizer: None gives no text at all.
        certain: Takes text that no token can change any more, and returns what may be
            shown of it and of what it held back before.
    """

    def __init__(
        self, tokenizer: Any, certain: Callable[[str], str] | None = None
    ) -> None:
        self._tokenizer, self._certain = tokenizer, certain
        self._skipped = special_tokens(tokenizer).keys()
        self._window: list[int] = []  # the last tokens
        self._shown = 0  # characters of the window's text that are given out
        self._cleans = tokenizer is not None and _cleans(tokenizer)
        self._uncleaned = ""
        self._length = 0  # characters given out in all

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain once ``tokens`` have come; it may be empty."""
        if self._tokenizer is None:
            return ""
        piece = "".join(self._add(token) for token in tokens)
        if self._certain is not None:
            piece = self._certain(piece)
        self._length += len(piece)
        return piece

    def rest(self, text: str) -> str:
        """What is left of ``text``, which is that of all tokens, once all have come."""
        piece = text[self._length :]
        self._length += len(piece)
        return piece

    def _add(self, token: int) -> str:
        if token in self._skipped:
            return ""
        self._window.append(token)
        # Bytes of one run are read together: a later one may spoil them all.
        if self._is_byte(token):
            return ""
        text = self._decoded(self._window)
        # A replacement character at the end may be an unfinished one.
        stable = len(text) - text.endswith(REPLACEMENT)
        piece = text[self._shown : stable]
        self._shown = max(self._shown, stable)
        if len(self._window) >= 2 * CONTEXT_TOKENS:
            self._shorten(text[self._shown :])
        return self._cleaned(piece)

    def _shorten(self, held: str) -> None:
        """Keep the window's end, ``held`` of which isn't given out yet.

        It must show something before that: decoders treat what stands first
        differently, and may drop a space in front.
        """
        size = CONTEXT_TOKENS
        while size < min(len(self._window), LONGEST_CONTEXT):
            text = self._decoded(self._window[-size:])
            before = text[: len(text) - len(held)]
            if text.endswith(held) and before.strip(f" \n\t{REPLACEMENT}"):
                self._window, self._shown = self._window[-size:], len(before)
                return
            size *= 2
        if len(self._window) > 2 * LONGEST_CONTEXT:
            self._window = self._window[-LONGEST_CONTEXT:]
            self._shown = len(self._decoded(self._window)) - len(held)

    def _is_byte(self, token: int) -> bool:
        name = self._tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and _BYTE_TOKEN.fullmatch(name) is not None

    def _decoded(self, ids: Sequence[int]) -> str:
        given = {"clean_up_tokenization_spaces": False} if self._cleans else {}
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, **given))

    def _cleaned(self, piece: str) -> str:
        if not self._cleans:
            return piece
        self._uncleaned += piece
        cut = _safe_cut(self._uncleaned)
        done, self._uncleaned = self._uncleaned[:cut], self._uncleaned[cut:]
        return str(self._tokenizer.clean_up_tokenization(done))


def _cleans(tokenizer: Any) -> bool:
    """Whether decoding cleans up spaces; transformers doesn't for some tokenizers."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    for text in ("a .", "a ?", "a ' s", "1 ,"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        as_it_is = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if tokenizer.clean_up_tokenization(as_it_is) != as_it_is:
            return bool(tokenizer.decode(ids) != as_it_is)
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return type(model).__name__ != "BPE"


def _safe_cut(text: str) -> int:
    """The last place at which ``text`` can be cleaned up in two parts.

    That is before a space that follows an ordinary character, or where no space has
    been for longer than a pattern reaches.
    """
    for at in range(len(text) - 1, 0, -1):
        if text[at] == " " and text[at - 1] not in " 'n":
            return at
        if at >= _CLEAN_REACH and " " not in text[at - _CLEAN_REACH : at + 1]:
            return at
    return 0
