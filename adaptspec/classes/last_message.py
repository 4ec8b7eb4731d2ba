"""Finds the last message of a chat that is given as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MARKS = ("\ue000one\ue000", "\ue000two\ue000", "\ue000three\ue000")


class LastMessage:
    """Reads the last user message of a chat without the template around it.

    Args:
        tokenizer: The model's.
        most: Tokens that are read at each end of a long prompt.
    """

    def __init__(self, tokenizer: Any, most: int = 1024) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._template = _around(tokenizer)  # a template is a program, and slow

    def __call__(self, ids: Sequence[int]) -> str:
        """The message; where ``ids`` aren't a chat of the template, their text.

        Of a message that is longer than what is read, its two ends.
        """
        ends = [list(ids)]
        if len(ids) > 2 * self._most:
            ends = [list(ids[: self._most]), list(ids[-self._most :])]
        if self._template is not None:
            opening, header, closing = self._template
            texts = [self._decoded(end, skip_special_tokens=False) for end in ends]
            last = texts[-1].removesuffix(closing)
            at = last.rfind(header)
            if last != texts[-1] and at >= 0:
                return last[at + len(header) :]
            if last != texts[-1] and texts[0].startswith(opening):
                return "\n".join([*texts[:-1], last]).removeprefix(opening)
        return "\n".join(self._decoded(end, skip_special_tokens=True) for end in ends)

    def _decoded(self, ids: list[int], skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


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
