"""Value types to and from JSON-ready dictionaries; also the export format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from adaptspec.errors import ProfileStoreError
from adaptspec.profile import Profile

FORMAT = "adaptspec-profiles-1"

_PROFILE: TypeAdapter[Profile] = TypeAdapter(Profile)


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """A JSON-ready record; :func:`profile_from_json` gives back an equal profile."""
    record: dict[str, Any] = _PROFILE.dump_python(profile, mode="json")
    record["created"] = profile.created.isoformat()
    return record


def profile_from_json(record: Mapping[str, Any]) -> Profile:
    """A validated profile without its id.

    Raises:
        ProfileStoreError: naming the field that is wrong.
    """
    try:
        profile = _PROFILE.validate_python({**record, "id": None})
    except (ValidationError, TypeError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            text = f"{field}: {first['msg'].lower()}"
        else:
            text = str(error)
        raise ProfileStoreError(text) from None
    if not isinstance(profile.created, datetime) or profile.created.tzinfo is None:
        raise ProfileStoreError("created: a time with its zone is expected")
    return profile


def environment_digest(fields: Mapping[str, Any]) -> str:
    """What makes an environment row distinct."""
    text = json.dumps(dict(fields), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
