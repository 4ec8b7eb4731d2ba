"""Two tokenizers side by side: the bytes their tokens spell, and text read by both."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from adaptspec.model.language_model import LanguageModel

# Tokens re-encoded again with what follows them: a merge doesn't reach further back.
LOOKBEHIND = 8
# Committed tokens re-encoded in every step, at most, where two tokenizers never agree
# on a boundary (one of them changes the text).
LONGEST_TAIL = 64
# A tokenizer that begins every text with a space of its own keeps a line break as it
# is, and what follows the break too.
ANCHOR = "\n"
PROBES = 16

_INVALID = re.compile("[\udc80-\udcff]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """A tokenizer whose tokens are the bytes they spell.

    Special tokens, and ids that the tokenizer doesn't know, spell nothing.

    Args:
        tokenizer: Byte-level (GPT-2 and later) or with spaces written as U+2581
            (SentencePiece).
        size: Tokens that the model has; ids from there on are left out.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer = tokenizer
        known = {token: i for token, i in tokenizer.get_vocab().items() if i < size}
        added = tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special}
        special.update(tokenizer.all_special_ids)
        self.specials = {token: i for token, i in known.items() if i in special}
        spell = _spelling([token for token, i in known.items() if i not in added])
        self._pieces: list[bytes | None] = [None] * (
            max(known.values(), default=-1) + 1
        )
        self.ids: dict[bytes, int] = {}  # of tokens that spell the same, the first
        for token, index in sorted(known.items(), key=lambda item: item[1]):
            if index in special:
                continue
            piece = token.encode() if index in added else spell(token)
            self._pieces[index] = piece
            self.ids.setdefault(piece, index)
        self.begin = self._role(tokenizer.bos_token_id)
        self.end = self._role(tokenizer.eos_token_id)
        # What the tokenizer itself puts before a text.
        first = tokenizer("")["input_ids"][:1]
        self.prefix = [self.begin] if self.begin is not None in first else []
        self._anchored = False
        self.exact = self._spells()
        if not self.exact:
            self._anchored = True
            self.exact = self._spells()

    def piece(self, token: int) -> bytes | None:
        """What ``token`` spells, None if nothing."""
        return self._pieces[token] if token < len(self._pieces) else None

    def encode(self, text: str) -> list[int]:
        """The tokenizer's tokens for ``text`` in the middle of a longer one.

        Special tokens that ``text`` names are spelled out.
        """
        if self._anchored:
            ids = self.after(self._encode(ANCHOR + text), text.encode())
            if ids is not None:
                return ids
        return self._encode(text)

    def spell(self, data: bytes) -> list[int]:
        """Tokens for bytes that needn't be UTF-8: what isn't becomes single bytes."""
        text = data.decode(errors="surrogateescape")
        if text.isascii() or not _INVALID.search(text):
            return self.encode(text) if text else []
        ids: list[int] = []
        for invalid, part in itertools.groupby(text, key=_is_invalid):
            joined = "".join(part)
            if not invalid:
                ids += self.encode(joined)
                continue
            for byte in joined.encode(errors="surrogateescape"):
                token = self.ids.get(bytes([byte]))
                ids += self.encode("\ufffd") if token is None else [token]
        return ids

    def after(self, ids: Sequence[int], data: bytes) -> list[int] | None:
        """The last of ``ids``, those that spell ``data``; None if none do."""
        left, start = len(data), len(ids)
        while left > 0 and start > 0:
            start -= 1
            piece = self.piece(ids[start])
            if piece is None or not data[:left].endswith(piece):
                return None
            left -= len(piece)
        return list(ids[start:]) if left == 0 else None

    def _encode(self, text: str) -> list[int]:
        return list(
            self._tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
        )

    def _role(self, token: int | None) -> int | None:
        return token if token in self.specials.values() else None

    def _spells(self) -> bool:
        """Whether a text made of the tokenizer's own words comes back from it."""
        words = [
            piece
            for piece in self.ids
            if piece.isascii() and piece.decode().strip(" ").isalnum()
        ]
        text = b"".join(words[:: max(1, len(words) // PROBES)])
        ids = self.encode(text.decode())
        return b"".join(self.piece(token) or b"?" for token in ids) == text


class Pairing:
    """Which of a draft's tokens are which of the target's.

    A token is shared if both spell the same, or are special under the same name, or
    begin or end a text. The relation is one to one.
    """

    def __init__(self, target: Vocabulary, draft: Vocabulary) -> None:
        self.target, self.draft = target, draft
        self.to_draft: dict[int, int] = {
            index: draft.ids[piece]
            for piece, index in target.ids.items()
            if piece in draft.ids
        }
        self.special_to_draft: dict[int, int] = {
            index: draft.specials[name]
            for name, index in target.specials.items()
            if name in draft.specials
        }
        for mine, theirs in ((target.begin, draft.begin), (target.end, draft.end)):
            taken = self.special_to_draft
            if mine is None or theirs is None or theirs in taken.values():
                continue
            taken.setdefault(mine, theirs)
        self.to_draft.update(self.special_to_draft)
        self.special_to_target = {d: t for t, d in self.special_to_draft.items()}


class DraftTokens:
    """The committed text in the draft's tokens, kept up with step by step.

    A step re-encodes what was committed since the last boundary that both tokenizers
    have in common, ``lookbehind`` tokens back or more.

    Args:
        direct: Target's token -> draft's: these are never re-encoded.
        lookbehind: How many of the last committed tokens are still open.
    """

    def __init__(
        self, pairing: Pairing, direct: Mapping[int, int], lookbehind: int
    ) -> None:
        self._target, self._draft = pairing.target, pairing.draft
        self._direct = direct
        self._lookbehind = lookbehind
        self.ids: list[int] = list(pairing.draft.prefix)
        self._read = 0  # committed tokens whose reading is final
        self._final = len(self.ids)  # draft tokens they are read as

    def extend(self, committed: Sequence[int]) -> int:
        """Read on; the first so many of ``ids`` are what they were before."""
        if not self._read and committed and self.ids:
            # The target's own first token takes the place of the draft's.
            if self._direct.get(committed[0]) == self.ids[0]:
                del self.ids[:1]
                self._final = 0
        tail = committed[self._read :]
        same = self._final
        ids, agreed = self._translate(tail)
        self.ids[same:] = ids
        last = len(tail) - self._lookbehind
        done = next((at for at in reversed(agreed) if at[0] <= last), (0, 0))
        if done == (0, 0) and len(tail) > LONGEST_TAIL:
            done = len(tail), len(ids)
        self._read += done[0]
        self._final += done[1]
        return same

    def _translate(
        self, tokens: Sequence[int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Draft tokens, and the counts of both tokens at the boundaries they share."""
        ids: list[int] = []
        agreed: list[tuple[int, int]] = []
        start = 0
        while start < len(tokens):
            token = tokens[start]
            piece = self._target.piece(token)
            if token in self._direct or piece is None:
                if token in self._direct:
                    ids.append(self._direct[token])
                start += 1
                agreed.append((start, len(ids)))
                continue
            ends = {0: start}  # bytes -> target tokens
            data = bytearray()
            while piece is not None and tokens[start] not in self._direct:
                data += piece
                start += 1
                ends[len(data)] = start
                if start == len(tokens):
                    break
                piece = self._target.piece(tokens[start])
            run = bytes(data)
            if start == len(tokens) and self._lookbehind:
                run = complete(run)
            spelled = self._draft.spell(run)
            agreed += self._shared(run, spelled, ends, len(ids))
            ids += spelled
        return ids, agreed

    def _shared(
        self, run: bytes, spelled: Sequence[int], ends: Mapping[int, int], before: int
    ) -> list[tuple[int, int]]:
        shared: list[tuple[int, int]] = []
        at = 0
        for count, token in enumerate(spelled, 1):
            piece = self._draft.piece(token)
            if piece is None or not run.startswith(piece, at):
                return []  # a normaliser changed the text
            at += len(piece)
            if at in ends:
                shared.append((ends[at], before + count))
        return shared


def complete(data: bytes) -> bytes:
    """``data`` without the character that it ends in the middle of."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data[:-back] if back < length else data
        if byte < 0x80:
            break
    return data


_pairings: WeakKeyDictionary[LanguageModel, WeakKeyDictionary[LanguageModel, Pairing]]
_pairings = WeakKeyDictionary()
_vocabularies: WeakKeyDictionary[LanguageModel, Vocabulary] = WeakKeyDictionary()


def pair(model: LanguageModel, draft: LanguageModel) -> Pairing:
    """The two models' vocabularies; worked out once, kept as long as both models."""
    drafts = _pairings.setdefault(model, WeakKeyDictionary())
    if draft not in drafts:
        drafts[draft] = Pairing(_vocabulary(model), _vocabulary(draft))
    return drafts[draft]


def _vocabulary(model: LanguageModel) -> Vocabulary:
    if model not in _vocabularies:
        _vocabularies[model] = Vocabulary(model.tokenizer, model.vocab_size)
    return _vocabularies[model]


def _is_invalid(character: str) -> bool:
    return "\udc80" <= character <= "\udcff"


def _spelling(tokens: Sequence[str]) -> Callable[[str], bytes]:
    """How a tokenizer's names for its tokens turn into bytes."""
    if any("\u2581" in token for token in tokens):
        return _spell_marked
    octets = _octets()

    def spell(token: str) -> bytes:
        try:
            return token.translate(octets).encode("latin-1")
        except UnicodeEncodeError:
            return token.encode()

    return spell


def _spell_marked(token: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace("\u2581", " ").encode()


def _octets() -> dict[int, int]:
    """Byte-level tokenizers' characters: printable Latin-1 as it is, the rest after."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {256 + i: byte for i, byte in enumerate(others)}
