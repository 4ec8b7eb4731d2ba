"""The router's table: which server answers the prompts of a class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from adaptspec.classes.classifier import Classifier
from adaptspec.errors import AdaptSpecError, RoutingError

SHAPE = (
    '{"servers": {"ngram": "http://127.0.0.1:8001", "plain": "http://127.0.0.1:8002"}, '
    '"classes": {"summarization": "ngram"}, "default": "plain"}'
)


def _base_url(value: str) -> str:
    """A server's address without what the router adds to it."""
    url = value.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname)
        fits = fits and not (parts.query or parts.fragment or parts.username)
        fits = fits and parts.port != 0
    except ValueError:
        fits = False
    if not fits or any(c.isspace() or ord(c) < 32 for c in url):
        raise ValueError(
            f"a server's URL must be like http://127.0.0.1:8001, got {value!r}"
        )
    return url


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _is_classifier(value: Any) -> Any:
    if value is not None:
        if not isinstance(value, Mapping):
            raise ValueError("a classifier must be the object that the export wrote")
        try:
            Classifier.from_json(value)
        except AdaptSpecError as error:
            raise ValueError(str(error)) from None
    return value


ServerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
ClassName = Annotated[str, Field(min_length=1)]
Urls = Annotated[
    list[Annotated[str, BeforeValidator(_base_url)]],
    BeforeValidator(_as_list),
    Field(min_length=1),
]


class RouteTable(BaseModel):
    """What ``adaptspec route`` reads and ``adaptspec export --split`` writes.

    Args:
        servers: Name -> the server's URL, or several that are taken in turn. All serve
            the same model.
        classes: Class -> the name of the server that answers its prompts.
        default: The server of every other prompt.
        fallback: Whether another server answers where the right one is down. Each gives
            the same greedy text, more slowly.
        classifier: What tells a prompt's class from its text, as a tune learnt it.
            None: only requests that name their class have one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    servers: dict[ServerName, Urls] = Field(min_length=1)
    classes: dict[ClassName, str] = Field(default_factory=dict)
    default: str
    fallback: bool = True
    classifier: Annotated[dict[str, Any] | None, BeforeValidator(_is_classifier)] = None

    @model_validator(mode="after")
    def _names_its_servers(self) -> RouteTable:
        named = [(f"class {name!r}", server) for name, server in self.classes.items()]
        for where, server in [*named, ("default", self.default)]:
            if server not in self.servers:
                known = ", ".join(sorted(self.servers))
                raise ValueError(f"{where}: no server {server!r}; there are: {known}")
        return self

    @cached_property
    def teller(self) -> Classifier | None:
        """What tells a prompt's class from its text."""
        record = self.classifier
        return None if record is None else Classifier.from_json(record)

    @property
    def known_classes(self) -> frozenset[str]:
        """What a request may name as its class."""
        told = self.teller.names if self.teller is not None else ()
        return frozenset(self.classes) | frozenset(told)

    def server_of(self, prompt_class: str | None) -> str:
        """The name of the server that answers prompts of a class."""
        if prompt_class is None:
            return self.default
        return self.classes.get(prompt_class, self.default)


def read_table(path: Path) -> RouteTable:
    """The table in a JSON or YAML file.

    Raises:
        RoutingError: in one line: what is wrong, where, and what is expected.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
        raise RoutingError(
            f"the table {path} can't be read: {reason}; `adaptspec export --for ENGINE "
            "--split --table FILE` writes one"
        ) from None
    try:
        value = _value(text, path)
    except ValueError as error:
        raise RoutingError(
            f"{path}: a table must be JSON or YAML, got {error}; write {SHAPE}"
        ) from None
    if not isinstance(value, dict):
        raise RoutingError(f"{path}: a table must be an object such as {SHAPE}")
    try:
        return RouteTable.model_validate(value)
    except ValidationError as error:
        raise RoutingError(f"{path}: {_told(error)}") from None


def table_text(table: Mapping[str, Any], path: Path) -> str:
    """A table as its file holds it: JSON where the name ends so, else YAML."""
    if path.suffix == ".json":
        return json.dumps(table, indent=2, ensure_ascii=False) + "\n"
    import yaml

    return str(yaml.safe_dump(dict(table), sort_keys=False, allow_unicode=True))


def _value(text: str, path: Path) -> Any:
    import yaml

    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _told(error: ValidationError) -> str:
    """What is wrong and where, in one line."""
    parts = []
    for problem in error.errors():
        place = ".".join(str(item) for item in problem["loc"] if item != "[key]")
        said = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = ", ".join(RouteTable.model_fields)
            said = f"a table has no such key; it has: {known}"
        elif problem["type"] == "missing":
            said = f"it is missing; write {SHAPE}"
        elif problem["type"] == "string_pattern_mismatch":
            said = "a server's name must be of letters, digits, '.', '_' and '-'"
        parts.append(f"{place}: {said}" if place else said)
    return "; ".join(" ".join(part.split()) for part in parts)
