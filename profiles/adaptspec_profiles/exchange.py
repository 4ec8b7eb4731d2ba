"""Export and import of profiles, choices and their records as one JSON document."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any, TypeVar

from adaptspec.classes.classifier import KEY as CLASSIFIER
from adaptspec.errors import ProfileStoreError
from adaptspec.model.hardware_costs import COSTS_RECORD as COSTS
from adaptspec.model.hardware_costs import costs_owner
from adaptspec.profile import ClassChoice, Profile, ProfileStore
from adaptspec_profiles.as_json import (
    choice_from_json,
    json_value,
    profile_from_json,
    profile_to_json,
)
from adaptspec_profiles.older import choices_of
from adaptspec_profiles.renamed import renamed, without_gate

FORMAT = "adaptspec-profiles-2"
FORMAT_1 = "adaptspec-profiles-1"  # with other names of parameters

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """A run's JSON record: its classifier, or under a name of their own the costs of
    forwards in an environment."""

    run: str
    key: str
    value: Mapping[str, Any]


@dataclass(frozen=True)
class Exchange:
    """What a file holds.

    Args:
        choices: None where the file is of a version that stored none.
    """

    profiles: Sequence[Profile]
    choices: Sequence[ClassChoice] | None = None
    records: Sequence[Record] = field(default_factory=list)


def exported(store: ProfileStore, run: str | None) -> dict[str, Any]:
    """A store's document, or that of one run."""
    profiles, choices = store.profiles(run=run), store.choices(run=run)
    owners = {p.run: CLASSIFIER for p in profiles}
    owners |= {costs_owner(p.environment): COSTS for p in profiles}
    return {
        "format": FORMAT,
        "profiles": [profile_to_json(profile) for profile in profiles],
        "choices": [json_value(choice) for choice in choices],
        "records": [
            {"run": owner, "key": key, "value": value}
            for owner, key in owners.items()
            if (value := store.record(owner, key)) is not None
        ],
    }


def take_over(store: ProfileStore, found: Exchange) -> int:
    """Add what was read; of the same setting, class or record the newer one stays.

    Returns:
        How many profiles there are of what was read.
    """
    runs = {p.run for p in found.profiles}
    known = [p for run in runs for p in store.profiles(run=run)]
    newest = {_strategy(p): p.created for p in reversed(known)}  # newest come first
    new = [
        p
        for p in found.profiles
        if (at := newest.get(_strategy(p))) is None or at <= p.created
    ]
    ids = store.add_profiles(new)
    choices = found.choices
    if choices is None:
        choices = choices_of(found.profiles)
    here = [c for run in {c.run for c in choices} for c in store.choices(run=run)]
    decided = {(c.run, c.prompt_class): c.created for c in here}
    store.put_choices(
        [
            # What a person pinned elsewhere isn't pinned here.
            replace(c, pinned=False)
            for c in choices
            if (at := decided.get((c.run, c.prompt_class))) is None or at <= c.created
        ]
    )
    for record in found.records:
        mine = store.record(record.run, record.key)
        if mine is None or _created(mine) < _created(record.value):
            store.put_record(record.run, record.key, record.value)
    return len(set(ids)) + len(found.profiles) - len(new)


def _strategy(profile: Profile) -> tuple[str, str, str, bool]:
    return (profile.run, profile.prompt_class, profile.strategy, profile.baseline)


def _created(record: Mapping[str, Any]) -> str:
    """When a record was made; those that don't say never replace another."""
    return str(record.get("measured", record.get("created", "")))


def read(file: IO[str]) -> Exchange:
    """All of a file.

    Raises:
        ProfileStoreError: naming the first bad record.
    """
    try:
        document = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ProfileStoreError(f"{file.name} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") not in (
        FORMAT,
        FORMAT_1,
    ):
        raise ProfileStoreError(
            f"{file.name} must have been written by `adaptspec profiles export` "
            f"(format {FORMAT!r})"
        )
    lists = {"profiles": True, "choices": False, "records": False}
    wrong = [
        name
        for name, needed in lists.items()
        if (needed or name in document) and not isinstance(document.get(name), list)
    ]
    if wrong or document.keys() - {"format", *lists}:
        keys = ", ".join(ascii(key) for key in document)
        raise ProfileStoreError(
            f"{file.name} must hold 'format', a list 'profiles', perhaps lists "
            f"'choices' and 'records', and nothing else, got {keys}"
            f"{f' without a list {wrong[0]!r}' if wrong else ''}; export it again"
        )
    first = document["format"] == FORMAT_1

    def profile(record: Any) -> Profile:
        if isinstance(record, dict) and "params" in record:
            params = without_gate(None, record["params"])
            if first:
                params = renamed(record.get("strategy"), params)
            record = {**record, "params": params}
        return profile_from_json(record)

    choices = None
    if "choices" in document:
        choices = _each(file, document, "choices", choice_from_json)
    return Exchange(
        _each(file, document, "profiles", profile),
        choices,
        _each(file, document, "records", _record),
    )


def _each(
    file: IO[str], document: Mapping[str, Any], name: str, make: Callable[[Any], T]
) -> list[T]:
    made = []
    for number, record in enumerate(document.get(name, ()), 1):
        try:
            made.append(make(record))
        except ProfileStoreError as error:
            raise ProfileStoreError(
                f"{file.name}, {name.removesuffix('s')} {number}: {error}; nothing was "
                "imported"
            ) from None
    return made


def _record(record: Any) -> Record:
    if (
        not isinstance(record, dict)
        or record.keys() != {"run", "key", "value"}
        or not isinstance(record["run"], str)
        or record["key"] not in (CLASSIFIER, COSTS)
        or not isinstance(record["value"], dict)
    ):
        raise ProfileStoreError(
            f"a record has a run, the key {CLASSIFIER!r} or {COSTS!r} and a value that "
            "is an object"
        )
    return Record(record["run"], record["key"], json_value(record["value"]))
