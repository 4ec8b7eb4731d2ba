"""Reads one row of a workload in any of the usual layouts.

A row is a JSON object. Its layout is told by the key that holds the prompt:

* ``prompt`` (a text, or chat messages) and ``messages``: AdaptSpec's own;
* ``body``: a request of OpenAI's batch files, with the messages and limits in it;
* ``conversations``: ShareGPT, a list of ``from`` and ``value``;
* ``turns``: Spec-Bench and MT-Bench, the user's turns as texts;
* ``instruction`` and perhaps ``input``: Alpaca.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from adaptspec.profile import EVERY_CLASS

TEXT_SHAPE = '{"prompt": "...", "class": "chat"}'
MESSAGE_SHAPE = '{"messages": [{"role": "user", "content": "..."}]}'
TURN_SHAPE = '{"conversations": [{"from": "human", "value": "..."}, ...]}'
BODY_SHAPE = f'{{"custom_id": "1", "body": {MESSAGE_SHAPE}}}'

LAYOUT_KEYS = ("prompt", "messages", "body", "conversations", "turns", "instruction")
TEXT_PARTS = ("text", "input_text", "output_text")
# Speakers of the ShareGPT layout, by the role a chat template knows.
ROLE_OF_SPEAKER = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# What a row may say beside the prompt -> the names it goes by, the first one first.
FIELD_NAMES = {
    "class": ("class", "category"),
    "id": ("id", "custom_id", "question_id"),
    "max_new_tokens": (
        *("max_new_tokens", "max_completion_tokens", "max_tokens"),
        "max_output_tokens",
    ),
    "raw": ("raw",),
    "tools": ("tools",),
}
# Keys of a layout that say nothing about the prompt, or are read elsewhere.
PASSED_OVER = {
    "body": {"method", "url", "body.model", "body.messages", "body.prompt"}
    | {"body.input"},
    "turns": {"reference"},
    "instruction": {"input", "output"},
}


class BadRow(ValueError):
    """What is wrong with a row.

    Args:
        way_out: What to write in its place.
    """

    def __init__(self, wrong: str, way_out: str = f"write {TEXT_SHAPE}") -> None:
        super().__init__(wrong)
        self.way_out = way_out


class NoUser(BadRow):
    """A conversation in which no user speaks; such data is cut that way."""


class MessageRow(BaseModel):
    """One message of a chat; ``content`` may be missing where tools are called."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: object) -> object:
        return _text_of_parts(value) if isinstance(value, list) else value

    @property
    def more(self) -> dict[str, Any]:
        """The fields of tools, with each call's arguments as an object."""
        more = self.model_dump(include={"tool_call_id", "name"}, exclude_none=True)
        if self.tool_calls:
            more["tool_calls"] = [_with_object_arguments(c) for c in self.tool_calls]
        return more


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True)

    prompt_class: Annotated[str, Field(min_length=1)] | None = None
    id: Annotated[str, Field(min_length=1)] | int | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    raw: bool = False
    tools: list[dict[str, Any]] | None = None


_TEXT = TypeAdapter(Annotated[str, Field(min_length=1)])
_MESSAGES = TypeAdapter(Annotated[list[MessageRow], Field(min_length=1)])


@dataclass(frozen=True)
class Row:
    """A row as it was understood: either ``text`` or ``messages`` is given.

    Args:
        unread: Keys that nothing here reads, such as ``body.temperature``.
    """

    text: str | None
    messages: Sequence[MessageRow]
    id: str | None
    prompt_class: str | None
    max_new_tokens: int | None
    raw: bool
    tools: Sequence[Mapping[str, Any]]
    unread: tuple[str, ...]


def understand(row: object, answers: bool = False) -> Row:
    """A decoded JSON value as a prompt.

    Args:
        answers: Keep what the assistant says at the end; else a conversation ends with
            the last message that isn't the assistant's, which is to be answered.

    Raises:
        BadRow: if it is none of the layouts, or a value is of the wrong kind.
        NoUser: if no user speaks in it.
    """
    if not isinstance(row, dict):
        raise BadRow(f"must be a JSON object, got {short(row)}")
    found = [name for name in LAYOUT_KEYS if row.get(name) is not None]
    if len(found) != 1:
        got = " and ".join(map(repr, found)) or f"none in {short(list(row))}"
        raise BadRow(
            f"one of {', '.join(map(repr, LAYOUT_KEYS))} must be given, got {got}"
        )
    (layout,) = found
    fields, unread = _fields(row, layout)
    text: str | None = None
    messages: Sequence[MessageRow] = ()
    if layout == "body":
        name, value = _asked(row["body"])
        text, messages = _text_or_messages(value, name, unread)
        # Of the endpoint for completions, which knows no chat template.
        fields.raw = fields.raw or name == "body.prompt"
    elif layout in ("prompt", "messages"):
        text, messages = _text_or_messages(row[layout], layout, unread)
    elif layout == "conversations":
        messages = _spoken(row["conversations"])
    elif layout == "turns":
        text = _first_turn(row["turns"])
    else:
        text, messages = _instructed(row, answers)
    while not answers and messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if fields.raw and text is None:
        raise BadRow(
            "'raw' is for a 'prompt'; messages need the chat template",
            f"write {MESSAGE_SHAPE}",
        )
    return Row(
        text=text,
        messages=messages,
        id=None if fields.id is None else str(fields.id),
        prompt_class=fields.prompt_class,
        max_new_tokens=fields.max_new_tokens,
        raw=fields.raw,
        tools=tuple(fields.tools or ()),
        unread=tuple(dict.fromkeys(unread)),
    )


def _fields(row: Mapping[str, Any], layout: str) -> tuple[_Fields, list[str]]:
    """What a row says beside its prompt, and the keys that nothing reads.

    In a request of OpenAI's the body's keys count like the row's own.
    """
    given = {key: value for key, value in row.items() if value is not None}
    if layout == "body" and isinstance(row["body"], dict):
        body = row["body"].items()
        given |= {f"body.{key}": value for key, value in body if value is not None}
    passed = {layout} | PASSED_OVER.get(layout, set())
    found: dict[str, Any] = {}
    for field, names in FIELD_NAMES.items():
        for key in (*names, *(f"body.{name}" for name in names)):
            if key in given:
                found.setdefault(field, (key, given[key]))
                passed.add(key)
    wanted = {
        "prompt_class" if field == "class" else field: value
        for field, (_, value) in found.items()
    }
    try:
        fields = _Fields.model_validate(wanted)
    except ValidationError as error:
        called = {field: key for field, (key, _) in found.items()}
        called["prompt_class"] = called.get("class", "class")
        raise BadRow(_explain(error, called)) from error
    if fields.prompt_class == EVERY_CLASS:
        key, _ = found["class"]
        raise BadRow(f"{key!r} must not be {EVERY_CLASS!r}, which is all classes")
    if any(unicodedata.category(each) == "Cc" for each in fields.prompt_class or ""):
        key, value = found["class"]
        raise BadRow(f"{key!r} must hold no control characters, got {short(value)}")
    return fields, [_short_key(key) for key in given if key not in passed]


def _asked(body: object) -> tuple[str, object]:
    """The prompt of a request's body, and the key that it stands under."""
    way_out = f"write {BODY_SHAPE}"
    if not isinstance(body, dict):
        raise BadRow(f"'body' must be an object, got {short(body)}", way_out)
    names = [k for k in ("messages", "prompt", "input") if body.get(k) is not None]
    if len(names) != 1:
        raise BadRow(
            "one of 'body.messages', 'body.prompt' and 'body.input' must be given, got "
            f"{' and '.join(names) or 'none'}",
            way_out,
        )
    return f"body.{names[0]}", body[names[0]]


def _text_or_messages(
    value: object, key: str, unread: list[str]
) -> tuple[str | None, Sequence[MessageRow]]:
    """A text, or chat messages; ``messages`` must be the latter."""
    must_be_list = key.endswith("messages")
    way_out = f"write {MESSAGE_SHAPE if must_be_list else TEXT_SHAPE}"
    if key.startswith("body."):
        way_out = f"write {BODY_SHAPE}"
    try:
        if not must_be_list and not isinstance(value, list):
            return _TEXT.validate_python(value, strict=True), ()
        rows = _MESSAGES.validate_python(value, strict=True)
    except ValidationError as error:
        raise BadRow(_explain(error, {}, key), way_out) from error
    for number, message in enumerate(rows):
        if message.content is None and not message.tool_calls:
            raise BadRow(f"'{key}.{number}.content' is missing", way_out)
        unread += [
            f"{key}.{_short_key(name)}"
            for name, value in (message.model_extra or {}).items()
            if value is not None
        ]
    if all(message.role == "assistant" for message in rows):
        raise NoUser(f"'{key}' must have a message that isn't the assistant's", way_out)
    return None, rows


def _spoken(turns: object) -> list[MessageRow]:
    """ShareGPT's turns from the user's first on: what was said before is cut data."""
    way_out = f"write {TURN_SHAPE}"
    if not isinstance(turns, list):
        raise BadRow(
            f"'conversations' must be a list of turns, got {short(turns)}", way_out
        )
    messages: list[MessageRow] = []
    spoken = False
    for turn in turns:
        speaker, said = (
            (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (0, 0)
        )
        if not isinstance(speaker, str) or not isinstance(said, str):
            wrong = f"a turn needs 'from' and 'value', both text, got {short(turn)}"
            raise BadRow(wrong, way_out)
        if (role := ROLE_OF_SPEAKER.get(speaker)) is None:
            raise BadRow(
                f"'from' must be one of {', '.join(ROLE_OF_SPEAKER)}, got "
                f"{short(speaker)}",
                way_out,
            )
        spoken = spoken or role == "user"
        if spoken or role == "system":
            messages.append(MessageRow(role=role, content=said))
    if not spoken:
        raise NoUser("no user speaks in 'conversations'", way_out)
    return messages


def _first_turn(turns: object) -> str:
    """The first: those behind it ask about answers that the row doesn't hold."""
    text = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(text, str) or not text:
        raise BadRow(
            f"'turns' must be a list of texts, the first of them not empty, got "
            f"{short(turns)}",
            'write {"turns": ["..."], "category": "chat"}',
        )
    return text


def _instructed(
    row: Mapping[str, Any], answers: bool
) -> tuple[str | None, Sequence[MessageRow]]:
    """The instruction, an empty line and the input; with the answer, if it is there."""
    way_out = 'write {"instruction": "...", "input": "...", "output": "..."}'
    texts = {k: row.get(k) or "" for k in ("instruction", "input", "output")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise BadRow(
                f"'{key}' should be a valid string, got {short(value)}", way_out
            )
    if not texts["instruction"]:
        raise BadRow("'instruction' should have at least 1 character, got ''", way_out)
    text = "\n\n".join(filter(None, (texts["instruction"], texts["input"])))
    if not answers or not texts["output"]:
        return text, ()
    return None, [
        MessageRow(role="user", content=text),
        MessageRow(role="assistant", content=texts["output"]),
    ]


def _text_of_parts(parts: list[Any]) -> str:
    found = []
    for part in parts:
        if isinstance(part, str):
            found.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS or not isinstance(text, str):
            what = f"of type {short(kind)}" if kind else short(part)
            raise ValueError(f"only text parts can be read, got one {what}")
        found.append(text)
    return "".join(found)


def _with_object_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI writes a call's arguments as JSON text; chat templates want the object."""
    inner = call.get("function")
    if not isinstance(inner, dict) or not isinstance(inner.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(inner["arguments"])
    except (ValueError, RecursionError):
        return dict(call)
    if not isinstance(arguments, dict):
        return dict(call)
    return {**call, "function": {**inner, "arguments": arguments}}


def _explain(error: ValidationError, called: Mapping[str, str], outer: str = "") -> str:
    """The first problem of each key, in words.

    Args:
        called: Field -> the key that it was read from.
        outer: The key whose value was checked; empty for the row itself.
    """
    problems: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        keys = [called.get(str(part), str(part)) for part in problem["loc"]]
        if not outer and problem["loc"][0] == "id":
            del keys[1:]  # which member of the union; means nothing to a reader
        key = ".".join([outer, *keys] if outer else keys)
        if problem["type"] == "value_error":
            text = f"{key!r}: {problem['ctx']['error']}"
        elif problem["type"] == "missing":
            text = f"{key!r} is missing"
        else:
            said = problem["msg"].removeprefix("Input ").lower()
            text = f"{key!r} {said}, got {short(problem['input'])}"
        problems.setdefault(key, text)
    return "; ".join(problems.values())


def short(value: object) -> str:
    """A value for an error's line, in ASCII: half a surrogate pair can't be shown."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _short_key(key: str) -> str:
    """A key for a line, without quotes: it may hold anything."""
    return ascii(key)[1:-1][:40]
