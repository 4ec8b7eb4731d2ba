"""Named prompt sets read from files, split into a tuning and a reporting part."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptspec.errors import WorkloadError
from adaptspec.workload_formats import TEXT_SHAPE, BadRow, NoUser, Row, understand

if TYPE_CHECKING:
    from adaptspec.model.language_model import LanguageModel

DEFAULT_CLASS = "default"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Args:
        more: What the chat template reads beside: ``tool_calls``, ``tool_call_id``,
            ``name``.
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def as_dict(self) -> dict[str, Any]:
        """As a chat template takes it; a message that only calls tools has no text."""
        if self.more.get("tool_calls") and not self.content:
            return {"role": self.role, **self.more}
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True)
class Prompt:
    """One prompt: either ``text`` or ``messages`` is set, never both.

    Args:
        max_new_tokens: None leaves the length to whoever runs it.
        where: The file and line that it was read from.
        raw: Whether ``text`` is read as it is, without the chat template.
        tools: JSON schemas of what the model may call, for the chat template.
    """

    id: str
    prompt_class: str = DEFAULT_CLASS
    text: str | None = None
    messages: tuple[Message, ...] = ()
    max_new_tokens: int | None = None
    where: str = field(default="", compare=False, kw_only=True)
    raw: bool = False
    tools: Sequence[Mapping[str, Any]] = field(default=(), hash=False)

    @property
    def content(self) -> str | list[dict[str, Any]]:
        """What ``LanguageModel.encode`` and ``Decoder.generate`` take."""
        if self.text is not None:
            return self.text
        return [message.as_dict() for message in self.messages]

    def encode(self, model: LanguageModel) -> list[int]:
        """Its token ids, as ``Decoder.generate`` would read them.

        Raises:
            InvalidPromptError: if the model can't read it.
        """
        return model.encode(self.content, raw=self.raw, tools=self.tools or None)


@dataclass(frozen=True)
class Workload:
    """Prompts under a name.

    Args:
        reused: After a split, the classes too small to divide: their one prompt
            stands on both sides, so their result isn't on unseen prompts.
        skipped: Of each bad line that was left out in reading, what is wrong with it.
        notes: What else a reader of the file should be told, in sentences.
        of_class: Class -> how many prompts it had before some were left out.
    """

    name: str
    prompts: tuple[Prompt, ...]
    reused: frozenset[str] = field(default=frozenset(), kw_only=True)
    skipped: tuple[str, ...] = field(default=(), kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    of_class: Mapping[str, int] = field(
        default_factory=dict, kw_only=True, compare=False
    )

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the prompts and their ids, whatever their order and the name."""
        rows = [
            [p.id, p.prompt_class, p.content, p.max_new_tokens, p.raw]
            + ([list(p.tools)] if p.tools else [])
            for p in sorted(self.prompts, key=lambda p: p.id)
        ]
        canonical = json.dumps(rows, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes, in the order they first appear."""
        return tuple(dict.fromkeys(p.prompt_class for p in self.prompts))

    def by_class(self) -> dict[str, tuple[Prompt, ...]]:
        """Class -> its prompts, both in the order they appear."""
        return {
            name: tuple(p for p in self.prompts if p.prompt_class == name)
            for name in self.classes
        }

    @property
    def counts(self) -> dict[str, int]:
        """Class -> how many prompts were asked for, also those that were left out."""
        return {n: self.of_class.get(n, len(p)) for n, p in self.by_class().items()}

    def as_raw(self) -> Workload:
        """The same with every text read as it is, without the chat template."""
        prompts = (replace(p, raw=p.text is not None) for p in self.prompts)
        return replace(self, prompts=tuple(prompts))

    def limit(self, count: int) -> Workload:
        """At most ``count`` prompts in all, taken from the classes in turn."""
        if count < 1:
            raise WorkloadError(f"a limit must be 1 prompt or more, got {count}")
        rounds = zip_longest(*self.by_class().values())
        turns = [p for turn in rounds for p in turn if p is not None]
        return replace(self, prompts=tuple(turns[:count]))


def read_workload(
    path: Path, skip_bad: bool = False, answers: bool = False
) -> Workload:
    """The workload in a file, named after the file; ``-`` is standard input.

    The file holds JSON lines, or one JSON array, also packed by gzip; blank lines are
    skipped. A row has one of the layouts of :mod:`adaptspec.workload_formats`. Without
    an id its line (or its place in the array) is its id. What nothing reads is told
    once in ``notes``, and so are conversations in which no user speaks, which are left
    out.

    Args:
        skip_bad: Leave bad rows out; the workload's ``skipped`` tells of them.
        answers: Keep the assistant's answers at the end of conversations. Without, a
            conversation ends with its last message that isn't the assistant's.

    Raises:
        WorkloadError: naming file, line number, what is wrong and what is expected.
    """
    name = "standard input" if str(path) == STANDARD_INPUT else str(path)
    place_of: dict[str, str] = {}
    prompts = []
    skipped = []
    unread: Counter[str] = Counter()
    mute = 0
    for number, place, value in _rows(_content(path, name)):
        try:
            if isinstance(value, BadRow):
                raise value
            row = understand(value, answers)
            prompt = _prompt(number, row)
            if (first := place_of.setdefault(prompt.id, place)) != place:
                raise BadRow(
                    f"id {prompt.id!r} is {first}'s already",
                    "give each line an id of its own, or none at all",
                )
        except NoUser:
            mute += 1
            continue
        except BadRow as bad:
            told = f"{name}, {place}: {bad}; {bad.way_out}"
            if not skip_bad:
                raise WorkloadError(told) from bad
            skipped.append(told)
            continue
        unread.update(row.unread)
        prompts.append(replace(prompt, where=f"{name}, {place}"))
    notes = []
    if mute:
        notes.append(
            f"{name}: {mute} of {mute + len(prompts)} conversations are left out: no "
            "user speaks in them"
        )
    if unread:
        keys = ", ".join(f"{key} ({count})" for key, count in unread.most_common(8))
        more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
        notes.append(f"{name}: keys that aren't read (in so many rows): {keys}{more}")
    if not prompts:
        got = "an empty file"
        if skipped or mute:
            got = f"no good line ({(skipped or notes)[0]})"
        raise WorkloadError(
            f"{name}: a workload needs at least one prompt, got {got}; "
            f"write lines such as {TEXT_SHAPE}"
        )
    stem = "stdin" if str(path) == STANDARD_INPUT else Path(path).stem
    return Workload(stem, tuple(prompts), skipped=tuple(skipped), notes=tuple(notes))


def example_workload() -> Workload:
    """The prompts that ship with AdaptSpec."""
    return read_workload(Path(__file__).with_name("example.jsonl"))


def split(
    workload: Workload, seed: int = 0, tune_fraction: float = 0.5
) -> tuple[Workload, Workload]:
    """Prompts to tune on and prompts to report on, divided within each class.

    Which side a prompt falls on depends on ``seed`` and the ids of its class, not on
    their order. Both sides hold every class; a class with one prompt uses it on both
    and is named in ``reused``.
    """
    if not 0 < tune_fraction < 1:
        raise WorkloadError(f"0 < tune_fraction < 1 must hold, got {tune_fraction}")
    tune: set[str] = set()
    held_out: set[str] = set()
    reused: set[str] = set()
    for name, prompts in workload.by_class().items():
        ids = sorted((p.id for p in prompts), key=lambda id: _draw(seed, id))
        if len(ids) == 1:
            reused.add(name)
            tune.update(ids)
            held_out.update(ids)
            continue
        cut = min(max(1, round(len(ids) * tune_fraction)), len(ids) - 1)
        tune.update(ids[:cut])
        held_out.update(ids[cut:])
    return (
        _side(workload, tune, frozenset(reused)),
        _side(workload, held_out, frozenset(reused)),
    )


def _side(workload: Workload, ids: set[str], reused: frozenset[str]) -> Workload:
    prompts = tuple(p for p in workload.prompts if p.id in ids)
    return Workload(workload.name, prompts, reused=reused)


def _draw(seed: int, prompt_id: str) -> tuple[bytes, str]:
    return hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest(), prompt_id


def _content(path: Path, name: str) -> bytes:
    try:
        if str(path) == STANDARD_INPUT:
            stream = sys.stdin
            data = getattr(stream, "buffer", stream).read()
            content = data.encode() if isinstance(data, str) else bytes(data)
        else:
            content = Path(path).read_bytes()
    except OSError as error:
        raise WorkloadError(
            f"can't read the workload {name}: {error.strerror or error}; "
            "give a file of JSON lines"
        ) from error
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise WorkloadError(
                f"can't unpack the workload {name}: {error}; give a whole gzip file, "
                "or JSON lines"
            ) from error
    return content.removeprefix(BYTE_ORDER_MARK)


def _rows(content: bytes) -> Iterator[tuple[int, str, Any]]:
    """Number, place in words, and the value there or what is wrong with it."""
    lines = content.split(b"\n")
    if content.lstrip()[:1] == b"[":
        whole, line = _value(content)
        if isinstance(whole, list):
            for number, value in enumerate(whole, start=1):
                yield number, f"item {number}", value
            return
        if isinstance(_value(lines[0])[0], BadRow):  # no lines of which one is a list
            yield line, f"line {line}", whole
            return
    # Split as bytes: str.splitlines would also break at U+2028 inside a prompt.
    for number, text in enumerate(lines, start=1):
        if text.strip():
            yield number, f"line {number}", _value(text)[0]


def _value(data: bytes) -> tuple[Any, int]:
    """What JSON it holds, or a ``BadRow`` and in which of its lines the fault is."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = error.start - (before.rfind(b"\n") + 1) + 1
        wrong = f"not UTF-8 at byte {column} of the line (0x{data[error.start]:02x})"
        return BadRow(wrong, "save the file as UTF-8"), before.count(b"\n") + 1
    try:
        return json.loads(text), 1
    except json.JSONDecodeError as error:
        wrong = f"not JSON ({error.msg} at column {error.colno})"
        return BadRow(wrong), error.lineno
    except (ValueError, RecursionError) as error:  # a number or nesting without end
        return BadRow(f"not JSON ({error})"), 1


def _prompt(number: int, row: Row) -> Prompt:
    return Prompt(
        id=str(number) if row.id is None else row.id,
        prompt_class=DEFAULT_CLASS if row.prompt_class is None else row.prompt_class,
        text=row.text,
        messages=tuple(Message(m.role, m.content or "", m.more) for m in row.messages),
        max_new_tokens=row.max_new_tokens,
        raw=row.raw,
        tools=row.tools,
    )
