"""The class of a request's prompt: named by a header, or told from its text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from adaptspec.classes.classifier import Classifier
from adaptspec.classes.text_features import prompt_text
from adaptspec.errors import RoutingError
from adaptspec.router.table import RouteTable

CLASS_HEADER = "x-adaptspec-class"
# Of a request with several prompts so many are looked at.
MOST_PROMPTS = 8


class NotJson(ValueError):
    """A request's body isn't JSON; with where it stops being JSON."""


def read_body(body: bytes) -> Any:
    """The JSON value of a request's body; None where it is nested too deeply to read.

    Raises:
        NotJson: with the reason, which quotes nothing of the body.
    """
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise NotJson(f"{error.msg} at {where}") from None
    except UnicodeDecodeError as error:
        raise NotJson(f"byte {error.start} isn't {error.encoding}") from None
    except (RecursionError, ValueError):  # or a number of too many digits
        return None


def told_class(classifier: Classifier | None, value: Any) -> str | None:
    """The class of a chat or of a text completion, by the last message or the text.

    None where it isn't clear, where prompts of several classes are asked for at once,
    and for token ids.

    Args:
        value: The request's JSON.
    """
    if classifier is None or not isinstance(value, Mapping):
        return None
    prompt = value.get("messages", value.get("prompt"))
    prompts = [prompt]
    if "messages" not in value and isinstance(prompt, list):
        prompts = prompt[:MOST_PROMPTS]
        if not all(isinstance(one, str) for one in prompts):
            return None
    texts = [prompt_text(one) for one in prompts]
    classes = {
        None if text is None else classifier.tell(text).prompt_class for text in texts
    }
    return classes.pop() if len(classes) == 1 else None


def named_class(table: RouteTable, header: str) -> str:
    """The class that a request names in its header, percent-encoded or as it is.

    Raises:
        RoutingError: naming the classes there are.
    """
    for name in (header, unquote(header)):
        if name in table.known_classes:
            return name
    known = ", ".join(sorted(table.known_classes)) or "none"
    raise RoutingError(
        f"{CLASS_HEADER}: no class {header!r}; the table has: {known}; without the "
        "header the class is told from the prompt"
    )


def as_header(name: str) -> str:
    """A class's name as a header can hold it."""
    return quote(name, safe="!#$&'()*+,-./:;<=>?@[]^_`{|}~")
