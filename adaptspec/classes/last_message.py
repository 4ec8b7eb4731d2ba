"""Finds the last message of a chat that is given as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MARKS = ("\ue000one\ue000", "\ue000two\ue000", "\ue000three\ue000")


def last_message(tokenizer: Any, ids: Sequence[int]) -> str:
    """The last user message without the template around it.

    Where ``ids`` aren't a chat of the tokenizer's template, their whole text.
    """
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    around = _around(tokenizer)
    if around is not None:
        opening, header, closing = around
        body = text.removesuffix(closing)
        at = body.rfind(header)
        if body != text and at >= 0:
            return body[at + len(header) :]
        if body != text and body.startswith(opening):
            return body.removeprefix(opening)
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _around(tokenizer: Any) -> tuple[str, str, str] | None:
    """What stands before a chat's first message, between an answer and the next
    message, and behind the last; None without a template that shows it."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    first, answer, second = _MARKS
    chat = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    try:
        shown = str(
            tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        )
    # A template is a program of the model's makers and may raise anything.
    except Exception:
        return None
    if any(shown.count(mark) != 1 for mark in _MARKS):
        return None
    opening, _, rest = shown.partition(first)
    header, _, closing = rest.partition(answer)[2].partition(second)
    return opening, header, closing
