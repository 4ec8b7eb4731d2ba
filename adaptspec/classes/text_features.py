"""A prompt's text as a vector: hashed counts of its byte n-grams.

Byte n-grams tell language, format and topic without a vocabulary (Cavnar and Trenkle
1994, "N-gram-based text categorization"); hashing them bounds the vector's length
(Weinberger and others 2009, "Feature hashing for large scale multitask learning").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptspec.model.messages import message_text

LONGEST_TEXT = 4096  # characters that are read: half from each end of a longer prompt
LONGEST_NGRAM = 3  # bytes; shorter ones count as well
WHOLE_BITS = 12  # counters of the whole text: two to this power
# An instruction often stands first, so the beginning counts once more.
START_BITS = 11
START_CHARACTERS = 40
START_WEIGHT = 0.5
FEATURES = (1 << WHOLE_BITS) + (1 << START_BITS)


def features(text: str) -> np.ndarray:
    """``[FEATURES]`` float32 of length 1; the same text gives the same vector.

    Takes about 0.1 ms however long the text is.
    """
    if len(text) > LONGEST_TEXT:
        half = LONGEST_TEXT // 2
        text = f"{text[:half]}\n{text[-half:]}"
    whole = _counts(text, WHOLE_BITS)
    start = START_WEIGHT * _counts(text[:START_CHARACTERS], START_BITS)
    both = np.concatenate([whole, start])
    return np.asarray(both / np.linalg.norm(both), np.float32)


def _counts(text: str, bits: int) -> np.ndarray:
    """``[2 ** bits]`` of length 1: logarithms of how often hashed n-grams occur."""
    # Line breaks around it make the first and the last words n-grams of their own.
    raw = f"\n{text.lower()}\n".encode("utf-8", "replace")
    values = np.frombuffer(raw, np.uint8).astype(np.uint32) + np.uint32(1)
    hashed = []
    ngrams = values  # as a polynomial, modulo 2 ** 32
    for size in range(1, min(LONGEST_NGRAM, len(values)) + 1):
        if size > 1:
            ngrams = ngrams[:-1] * np.uint32(257) + values[size - 1 :]
        # Multiplied by an odd number near 2 ** 32 / 1.618 (Knuth 1973, section 6.4).
        hashed.append(ngrams * np.uint32(2654435761) >> np.uint32(32 - bits))
    counted = np.bincount(np.concatenate(hashed).astype(np.int64), minlength=1 << bits)
    logs = np.log1p(counted)
    return np.asarray(logs / np.linalg.norm(logs))


def prompt_text(prompt: Any) -> str | None:
    """The text to tell a class by: of a chat its last message; None for token ids."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[-1], Mapping):
        return message_text(prompt[-1])
    return None
