"""Value types to and from JSON-ready dictionaries; also the export format."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from datetime import datetime, timezone
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from adaptspec.errors import ProfileStoreError
from adaptspec.profile import (
    ClassChoice,
    Environment,
    Measurement,
    Pick,
    Profile,
    Trial,
    Use,
)

LARGEST_INTEGER = 2**63 - 1  # of a database's column

T = TypeVar("T")
_PROFILE: TypeAdapter[Profile] = TypeAdapter(Profile)
_CHOICE: TypeAdapter[ClassChoice] = TypeAdapter(ClassChoice)
_TRIAL: TypeAdapter[Trial] = TypeAdapter(Trial)


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """A JSON-ready record; :func:`profile_from_json` gives back an equal profile.

    Raises:
        ProfileStoreError: naming the field that JSON or a database can't hold.
    """
    record = json_value(profile)
    assert isinstance(record, dict)
    return record


def profile_from_json(record: Any) -> Profile:
    """A validated profile without its id, its time in UTC.

    Raises:
        ProfileStoreError: naming the field that is wrong, missing or unknown.
    """
    if not isinstance(record, Mapping):
        raise ProfileStoreError(f"an object is expected, got {_short(record)}")
    _refuse_unknown(record, Profile, "")
    for name, cls in (("environment", Environment), ("measurement", Measurement)):
        if isinstance(record.get(name), Mapping):
            _refuse_unknown(record[name], cls, f"{name}.")
    return _validated(_PROFILE, {**record, "id": None})


def use_to_json(use: Use) -> dict[str, Any]:
    """A JSON-ready record of the sums, and the means that they come to."""
    sums = {name: value for name, value in asdict(use).items() if name != "kept"}
    return {
        **sums,
        "ratio": use.ratio,
        "tokens_per_second": use.tokens_per_second,
        "tokens_per_forward": use.tokens_per_forward,
        "acceptance": use.acceptance,
    }


def same_profile(profile: Profile) -> Profile:
    """An equal profile that shares nothing with ``profile``: no id, its time in UTC.

    Raises:
        ProfileStoreError: if it isn't one that every store gives back as it was put.
    """
    return profile_from_json(profile_to_json(profile))


def choice_from_json(record: Any) -> ClassChoice:
    """The same for a choice, whose record :func:`json_value` makes."""
    if not isinstance(record, Mapping):
        raise ProfileStoreError(f"an object is expected, got {_short(record)}")
    _refuse_unknown(record, ClassChoice, "")
    if isinstance(record.get("environment"), Mapping):
        _refuse_unknown(record["environment"], Environment, "environment.")
    picks = record.get("picks")
    for number, pick in enumerate(picks if isinstance(picks, list) else ()):
        if isinstance(pick, Mapping):
            _refuse_unknown(pick, Pick, f"picks.{number}.")
    return _validated(_CHOICE, record)


def same_choice(choice: ClassChoice) -> ClassChoice:
    """An equal choice that shares nothing with ``choice``; tuples become lists."""
    return choice_from_json(json_value(choice))


def setting_digest(params: Mapping[str, Any]) -> str:
    """Equal for equal parameters, in whatever order."""
    text = json.dumps(dict(params), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def measured_again_first(
    profiles: Sequence[Profile], known: Callable[[Profile], bool]
) -> list[int]:
    """In which order to store profiles, so that those that are known keep their ids."""
    return sorted(range(len(profiles)), key=lambda index: not known(profiles[index]))


def same_trial(trial: Trial) -> Trial:
    """The same for a trial; tuples become lists."""
    return _validated(_TRIAL, json_value(trial))


def json_value(value: Any, where: str = "") -> Any:
    """A copy of ``value`` in dicts with text keys, lists, text, finite numbers, None.

    Raises:
        ProfileStoreError: naming the place of anything else.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _bad(where, "must be text that UTF-8 can hold", value) from None
        if "\0" in value:  # PostgreSQL has no place for it
            raise _bad(where, "must be text without a zero character", value)
        return str(value)
    if isinstance(value, int):
        if abs(value) > LARGEST_INTEGER:
            raise _bad(where, "must be an integer of 64 bits", value)
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _bad(where, "must be a finite number", value)
        return float(value)
    if isinstance(value, datetime):
        return _utc(value, where).isoformat()
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise _bad(where, "must have text keys", strange[0])
        return {
            json_value(key, where): json_value(item, f"{where}.{key}".lstrip("."))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [
            json_value(item, f"{where}.{index}") for index, item in enumerate(value)
        ]
    raise _bad(where, "must be what JSON can hold", value)


def environment_digest(fields: Mapping[str, Any]) -> str:
    """What makes an environment row distinct."""
    text = json.dumps(dict(fields), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _validated(adapter: TypeAdapter[T], record: Any) -> T:
    # JSON in between: only there do strict types and times as text go together.
    text = json.dumps(json_value(record))
    try:
        found = adapter.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = [str(part) for part in first["loc"]]
        rule = str(first["msg"]).lower()
        if place[:1] == ["params"] and len(place) > 1:
            # Else it would be the rule of the union's first member.
            place, rule = place[:2], "must be a number, text, true or false"
        raise _bad(".".join(place), rule, first["input"]) from None
    if isinstance(found, Profile | ClassChoice):
        object.__setattr__(found, "created", _utc(found.created, "created"))
    return found


def _utc(time: datetime, where: str) -> datetime:
    if time.tzinfo is None:
        raise _bad(where, "must be a time with its zone", time.isoformat())
    try:
        return time.astimezone(timezone.utc)
    except OverflowError:
        raise _bad(
            where, "must lie in the years 1 to 9999 of UTC", time.isoformat()
        ) from None


def _refuse_unknown(record: Mapping[Any, Any], cls: type[Any], where: str) -> None:
    known = [field.name for field in fields(cls)]
    for name in record:
        if name not in known:
            raise ProfileStoreError(
                f"{where}{_plain(name)}: no such field; known: {', '.join(known)}"
            )


def _bad(where: str, rule: str, value: Any) -> ProfileStoreError:
    return ProfileStoreError(f"{_plain(where)}: {rule}, got {_short(value)}")


def _short(value: object) -> str:
    # ASCII only: what is shown may not be encodable, such as half a surrogate pair.
    try:
        text = ascii(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(name: object) -> str:
    return _short(name)[1:-1] if isinstance(name, str) else _short(name)
