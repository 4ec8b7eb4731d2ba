"""What a caller asks for, as a grammar of llguidance; errors name the place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adaptspec.errors import InvalidGrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from adaptspec.structured.vocabulary import Vocabulary

# Between the parts of a JSON text. Some models would write blanks without an end where
# any number is allowed. A schema's own "x-guidance" stands in for it.
JSON_LAYOUT: Any = {"whitespace_pattern": r"[ \t\n\r]{1,40}"}

# Where a JSON schema has schemas in it.
MAPS = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
ONES = ("items", "additionalProperties", "not", "contains", "propertyNames")

Path = tuple[str | int, ...]


def open_matcher(vocabulary: Vocabulary, control: str, value: Any) -> LLMatcher:
    """A new matcher of what a control asks for.

    Args:
        control: ``json_schema``, ``regex`` or ``grammar``.

    Raises:
        InvalidGrammarError: saying what is wrong, and where.
    """
    if control == "json_schema":
        return _of_schema(vocabulary, value)
    from llguidance import LLMatcher, grammar_from

    if control == "regex":
        found = vocabulary.matcher(LLMatcher.grammar_from_regex(value))
        if found.is_error():
            raise InvalidGrammarError(f"regex {_regex_problem(found.get_error())}")
        return found
    try:
        found = vocabulary.matcher(grammar_from("grammar", value))
    except ValueError as error:
        reason = str(error).removeprefix("Failed to convert the grammar from GBNF to ")
        raise InvalidGrammarError(
            f"grammar: {_line(reason.removeprefix('Lark: '))}"
        ) from None
    if found.is_error():
        raise InvalidGrammarError(f"grammar: {_grammar_problem(found.get_error())}")
    return found


def schema_of(value: Any) -> Any:
    """A schema as JSON has it, from any of the ways to give one.

    Raises:
        InvalidGrammarError: if it is none of them.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InvalidGrammarError(f"json_schema isn't JSON: {error}") from None
    elif isinstance(value, type) and hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if not isinstance(value, Mapping | bool):
        raise InvalidGrammarError(
            "json_schema must be a mapping, True, JSON text or a pydantic model "
            f"class, got {_line(repr(value))}"
        )
    return value


def _of_schema(vocabulary: Vocabulary, value: Any) -> LLMatcher:
    from llguidance import LLMatcher

    schema = schema_of(value)
    found = vocabulary.matcher(_schema_grammar(schema))
    if not found.is_error():
        return found

    def fails(other: Any) -> bool:
        return LLMatcher(
            vocabulary.tokens, _schema_grammar(other), log_level=0
        ).is_error()

    place = place_of_error(schema, fails)
    raise InvalidGrammarError(
        f"json_schema at {place or '/'}: {_regex_problem(found.get_error())}"
    )


def _schema_grammar(schema: Any) -> str:
    from llguidance import LLMatcher

    try:
        text = json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise InvalidGrammarError(f"json_schema isn't JSON: {error}") from None
    if schema is True:  # which is the same, but takes no options
        text = "{}"
    own = schema is False or (isinstance(schema, Mapping) and "x-guidance" in schema)
    return LLMatcher.grammar_from_json_schema(text, None if own else JSON_LAYOUT)


def place_of_error(schema: Any, fails: Callable[[Any], bool]) -> str:
    """JSON pointer of the innermost schema without which the whole doesn't fail.

    It is empty for the whole.
    """
    place: Path = ()
    inner = True
    while inner:
        inner = False
        for step in _schemas_in(_at(schema, place)):
            if not fails(_replaced(schema, (*place, *step), True)):
                place, inner = (*place, *step), True
                break
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in place)
    return "".join(f"/{step}" for step in steps)


def _schemas_in(schema: Any) -> Iterator[Path]:
    if not isinstance(schema, Mapping):
        return
    for key in MAPS:
        if isinstance(inner := schema.get(key), Mapping):
            yield from ((key, name) for name in inner)
    for key in LISTS:
        if isinstance(inner := schema.get(key), list):
            yield from ((key, place) for place in range(len(inner)))
    for key in ONES:
        if key in schema:
            yield (key,)


def _at(schema: Any, path: Path) -> Any:
    for step in path:
        schema = schema[step]
    return schema


def _replaced(schema: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    changed: Any = list(schema) if isinstance(schema, list) else dict(schema)
    changed[path[0]] = _replaced(schema[path[0]], path[1:], value)
    return changed


def _regex_problem(error: str) -> str:
    """What a regular expression's error says, with the place that its mark shows."""
    found = re.search(
        r"regex parse error:\n {4}(?P<text>[^\n]*)\n(?P<mark> *\^+)\s*\n"
        r"error: (?P<what>[^\n]*)",
        error,
    )
    if found is None:
        return _line(error.partition("<state>")[0])
    place = len(found["mark"]) - len(found["mark"].lstrip(" ")) - 4 + 1
    return f"{found['text']!r}, character {place}: {found['what']}"


def _grammar_problem(error: str) -> str:
    """Lark errors begin with "line(column)", and repeat the line below."""
    found = re.match(r"(?:at )?(\d+)\((\d+)\): (.*)", error, re.DOTALL)
    if found is None:
        return _line(error)
    line, column, rest = found.groups()
    what = rest if "regex parse error" not in rest else _regex_problem(rest)
    what = what.split("\n", 1)[0]
    return f"line {line}, column {column}: {what}"


def _line(text: str, most: int = 300) -> str:
    """A text in one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."
