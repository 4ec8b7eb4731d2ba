"""A prompt's text as numbers that a classifier compares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 8192  # characters looked at: half from each end of a longer prompt


NGRAM = 4  # words


FEATURES = (
    "length",  # logarithm of the number of words
    "repetition",  # share of 4-word sequences that stood before
    "vocabulary",  # distinct words / words
    "symbols",  # share of characters used by code rather than prose
    "digits",  # share of digits
    "capitals",  # share of upper-case letters
    "foreign",  # share of characters beyond ASCII
    "lines",  # line breaks per word
    "indented",  # share of lines that begin with white space
    "question",  # whether the last line ends with a question mark
    "word length",  # mean characters of a word
)


_SYMBOLS = frozenset("{}[]()<>=+*/\\|&^%$#@~`_;:\"'")


def features(text: str) -> list[float]:
    """What stands in :data:`FEATURES`, of a prompt's text; linear in its length.

    Prompt lookup and suffix trees gain where text repeats, draft models where it is
    predictable: repetition, symbols and shape tell these apart without a model.
    """
    if len(text) > LONGEST:
        text = text[: LONGEST // 2] + text[-LONGEST // 2 :]
    words = text.split()
    lines = text.splitlines() or [""]
    characters, count = max(1, len(text)), max(1, len(words))
    seen: set[tuple[str, ...]] = set()
    repeated = 0
    for at in range(len(words) - NGRAM + 1):
        ngram = tuple(words[at : at + NGRAM])
        repeated += ngram in seen
        seen.add(ngram)
    return [
        math.log1p(len(words)),
        repeated / max(1, len(words) - NGRAM + 1),
        len(set(words)) / count,
        sum(c in _SYMBOLS for c in text) / characters,
        sum(c.isdigit() for c in text) / characters,
        sum(c.isupper() for c in text) / characters,
        sum(not c.isascii() for c in text) / characters,
        min(3.0, (len(lines) - 1) / count),
        sum(line[:1].isspace() for line in lines) / len(lines),
        float(text.rstrip().endswith("?")),
        min(20.0, sum(map(len, words)) / count),
    ]


def prompt_text(prompt: Any) -> str | None:
    """The text to classify by: of a chat its last message; None for token ids."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[-1], Mapping):
        from adaptspec.model.prompts import message_text

        return message_text(prompt[-1])
    return None
