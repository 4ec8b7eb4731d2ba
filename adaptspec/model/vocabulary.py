"""Checks whether token ids mean the same to two models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from adaptspec.model.forward import TextModel


_compared: WeakKeyDictionary[TextModel, WeakKeyDictionary[TextModel, str | None]] = (
    WeakKeyDictionary()
)


def vocabulary_mismatch(model: TextModel, other: TextModel) -> str | None:
    """Why the text tokens of ``model`` and ``other`` differ, or None if they don't.

    Added tokens (special tokens, tools' marks, padding) may differ: verification
    corrects a draft that doesn't know one. Two models are compared once.
    """
    others = _compared.setdefault(model, WeakKeyDictionary())
    if other not in others:
        others[other] = _mismatch(model, other)
    return others[other]


def _mismatch(model: TextModel, other: TextModel) -> str | None:
    if model.tokenizer is None or other.tokenizer is None:
        if model.vocab_size != other.vocab_size:
            return (
                f"{model.name} has {model.vocab_size} tokens, "
                f"{other.name} {other.vocab_size}, and no tokenizers to compare"
            )
        return None
    every_mine, every_theirs = _tokens(model), _tokens(other)
    mine, theirs = _of_text(model, every_mine), _of_text(other, every_theirs)
    if mine == theirs:
        return None
    # A token of text here may be an added one there, and still be the same.
    differing = [
        token
        for token in {**mine, **theirs}
        if every_mine.get(token) != every_theirs.get(token)
    ]
    if not differing:
        return None
    first = min(
        differing, key=lambda token: (mine.get(token, theirs.get(token)), token)
    )
    return (
        f"{model.name} and {other.name} disagree on {len(differing)} of "
        f"{len({**mine, **theirs})} text tokens: {first!a} is "
        f"{_named(every_mine.get(first))} in the first and "
        f"{_named(every_theirs.get(first))} in the second"
    )


def _named(index: int | None) -> str:
    return "missing" if index is None else f"token {index}"


def _tokens(model: TextModel) -> dict[str, int]:
    """Token -> id, of those that the model has an output for."""
    known: dict[str, int] = model.tokenizer.get_vocab()
    return {token: i for token, i in known.items() if i < model.vocab_size}


def _of_text(model: TextModel, tokens: Mapping[str, int]) -> dict[str, int]:
    """The ``tokens`` that are neither special nor added."""
    tokenizer: Any = model.tokenizer
    left_out = {*getattr(tokenizer, "added_tokens_decoder", ())}
    left_out.update(getattr(tokenizer, "all_special_ids", ()))
    return {token: i for token, i in tokens.items() if i not in left_out}
