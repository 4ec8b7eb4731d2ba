"""Named prompt sets read from JSON lines, split into a tuning and a reporting part."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adaptspec.errors import WorkloadError

if TYPE_CHECKING:
    from adaptspec.model.language_model import LanguageModel

DEFAULT_CLASS = "default"
BOM = b"\xef\xbb\xbf"
SHAPE = '{"prompt": "...", "class": "chat"}'
MESSAGE_SHAPE = '{"messages": [{"role": "user", "content": "..."}]}'


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One prompt: either ``text`` or ``messages`` is set, never both.

    Args:
        max_new_tokens: None leaves the length to whoever runs it.
        where: The file and line that it was read from.
        raw: Whether ``text`` is read as it is, without the chat template.
    """

    id: str
    prompt_class: str = DEFAULT_CLASS
    text: str | None = None
    messages: tuple[Message, ...] = ()
    max_new_tokens: int | None = None
    where: str = field(default="", compare=False, kw_only=True)
    raw: bool = False

    @property
    def content(self) -> str | list[dict[str, str]]:
        """What ``LanguageModel.encode`` and ``Decoder.generate`` take."""
        if self.text is not None:
            return self.text
        return [{"role": m.role, "content": m.content} for m in self.messages]

    def encode(self, model: LanguageModel) -> list[int]:
        """Its token ids, as ``Decoder.generate`` would read them.

        Raises:
            InvalidPromptError: if the model can't read it.
        """
        return model.encode(self.content, raw=self.raw)


@dataclass(frozen=True)
class Workload:
    """Prompts under a name.

    Args:
        reused: After a split, the classes too small to divide: their one prompt
            stands on both sides, so their result isn't on unseen prompts.
        skipped: Of each bad line that was left out in reading, what is wrong with it.
    """

    name: str
    prompts: tuple[Prompt, ...]
    reused: frozenset[str] = field(default=frozenset(), kw_only=True)
    skipped: tuple[str, ...] = field(default=(), kw_only=True)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the prompts and their ids, whatever their order and the name."""
        rows = [
            [p.id, p.prompt_class, p.content, p.max_new_tokens, p.raw]
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


def read_workload(path: Path, skip_bad: bool = False) -> Workload:
    """The workload in a file of JSON lines, named after the file.

    A line has ``prompt`` (text) or ``messages`` (a chat), and may have ``class``,
    ``id``, ``max_new_tokens`` and, beside a text, ``raw``. Without an id its line
    number is its id. Blank lines are skipped.

    Args:
        skip_bad: Leave bad lines out; the workload's ``skipped`` tells of them.

    Raises:
        WorkloadError: naming file, line number, what is wrong and what is expected.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise WorkloadError(
            f"can't read the workload {path}: {error.strerror or error}; "
            "give a file of JSON lines"
        ) from error
    line_of: dict[str, int] = {}
    prompts = []
    skipped = []
    # Split as bytes: str.splitlines would also break at U+2028 inside a prompt.
    for number, line in enumerate(content.removeprefix(BOM).split(b"\n"), start=1):
        try:
            text = _text(path, number, line)
            if not text:
                continue
            prompt = _prompt(path, number, text)
            if (first := line_of.setdefault(prompt.id, number)) != number:
                raise _bad(
                    path,
                    number,
                    f"id {prompt.id!r} is line {first}'s already",
                    "give each line an id of its own, or none at all",
                )
        except WorkloadError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
            continue
        prompts.append(replace(prompt, where=f"{path}, line {number}"))
    if not prompts:
        got = f"no good line ({skipped[0]})" if skipped else "an empty file"
        raise WorkloadError(
            f"{path}: a workload needs at least one prompt, got {got}; "
            f"write lines such as {SHAPE}"
        )
    return Workload(Path(path).stem, tuple(prompts), skipped=tuple(skipped))


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


def _text(path: Path, number: int, line: bytes) -> str:
    """What the line holds; empty if it is blank."""
    try:
        return line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise _bad(
            path,
            number,
            f"not UTF-8 at byte {error.start + 1} of the line "
            f"(0x{line[error.start]:02x})",
            "save the file as UTF-8",
        ) from error


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _MessageLine(_Strict):
    role: Annotated[str, Field(min_length=1)]
    content: str


class _Line(_Strict):
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[_MessageLine], Field(min_length=1)] | None = None
    prompt_class: Annotated[str, Field(min_length=1, alias="class")] = DEFAULT_CLASS
    id: Annotated[str, Field(min_length=1)] | int | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    raw: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> _Line:
        if (self.prompt is None) == (self.messages is None):
            found = "neither" if self.prompt is None else "both"
            raise ValueError(f"one of 'prompt' and 'messages' must be given, {found}")
        if self.raw and self.prompt is None:
            raise ValueError("'raw' is for a 'prompt'; messages need the chat template")
        return self


def _prompt(path: Path, number: int, text: str) -> Prompt:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        wrong = f"not JSON ({error.msg} at column {error.colno})"
        raise _bad(path, number, wrong) from error
    except (ValueError, RecursionError) as error:  # a number or nesting without end
        raise _bad(path, number, f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise _bad(path, number, f"must be a JSON object, got {_short(row)}")
    try:
        line = _Line.model_validate(row)
    except ValidationError as error:
        way_out = f"write {MESSAGE_SHAPE}" if "messages" in row else f"write {SHAPE}"
        raise _bad(path, number, _explain(error), way_out) from error
    return Prompt(
        id=str(number if line.id is None else line.id),
        prompt_class=line.prompt_class,
        text=line.prompt,
        messages=tuple(Message(m.role, m.content) for m in line.messages or ()),
        max_new_tokens=line.max_new_tokens,
        raw=line.raw,
    )


def _explain(error: ValidationError) -> str:
    """The first problem of each key, in words."""
    problems: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        keys = [str(part) for part in problem["loc"]]
        if keys[:1] == ["id"]:
            del keys[1:]  # which member of the union; means nothing to a reader
        key = ".".join(keys)
        if problem["type"] == "extra_forbidden":
            known = _MessageLine if len(keys) > 1 else _Line
            names = [f.alias or name for name, f in known.model_fields.items()]
            text = f"unknown key {key!r}, known: {', '.join(names)}"
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
        elif problem["type"] == "missing":
            text = f"{key!r} is missing"
        else:
            said = problem["msg"].removeprefix("Input ").lower()
            text = f"{key!r} {said}, got {_short(problem['input'])}"
        problems.setdefault(key, text)
    return "; ".join(problems.values())


def _short(value: object) -> str:
    # ASCII only: what is shown may not be encodable, such as half a surrogate pair.
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _bad(
    path: Path, number: int, wrong: str, way_out: str = f"write {SHAPE}"
) -> WorkloadError:
    return WorkloadError(f"{path}, line {number}: {wrong}; {way_out}")
