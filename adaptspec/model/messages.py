"""The text of one chat message, whatever form it has; needs no tensor library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


def message_text(message: Any) -> str:
    """The text of one chat message, whatever the form of its content."""
    content = message_fields(message).get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    parts = [
        part if isinstance(part, str) else message_fields(part).get("text", "")
        for part in content
    ]
    return "".join(part for part in parts if isinstance(part, str))


def message_fields(value: Any) -> dict[str, Any]:
    """What a message holds: a mapping, a dataclass, or a pydantic model."""
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):
        return dict(dump())
    return {}
