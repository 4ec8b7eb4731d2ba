"""An engine's options as they were when its model was tuned, unless said anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from adaptspec.engines.exporting.options import Asked, decided_with, records_of
from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.profile import ProfileStore


def as_tuned(options: EngineOptions, store: ProfileStore) -> EngineOptions:
    """What isn't said of an engine as it was when its model was tuned: a choice holds
    for the draft model, heads and numbers that it was measured with.

    The newest tune at as many requests at a time tells, else the newest at any.
    """
    choices = [c for c in store.choices() if c.environment.engine == options.engine]
    records = records_of(Asked(model=options.model), store, choices).values()
    # Without a model it is the engine's own, which isn't one that was named then.
    known = [r for r in records if options.model or r.get("model") is None]
    if not known:
        return options
    load = options.concurrency
    same = [told for told in known if (told.get("concurrency") or 1) == load]
    return _with(options, [*same, *known][0])


def as_decided(
    options: EngineOptions, store: ProfileStore, classes_of: Mapping[str, Sequence[str]]
) -> EngineOptions:
    """What isn't said of an engine as it was in the run that decided most classes.

    Args:
        classes_of: Run -> the classes that it decided.
    """
    told, _ = decided_with(store, classes_of)
    return _with(options, told) if told else as_tuned(options, store)


def _with(options: EngineOptions, told: Mapping[str, Any]) -> EngineOptions:
    """What isn't said as a tune's record tells it, but for the requests at a time."""
    names = {
        "command": "engine_command",
        "python": "engine_python",
        "arguments": "engine_argument",
    }
    usual = EngineOptions()
    left = ["model", "concurrency"]
    if options.command or options.python:
        left += ["command", "python"]  # the other one named another installation
    changed: dict[str, Any] = {}
    for one in fields(EngineOptions):
        value = told.get(names.get(one.name, one.name))
        if one.name in left or not value:
            continue
        if getattr(options, one.name) == getattr(usual, one.name):
            changed[one.name] = tuple(value) if isinstance(value, list) else value
    return replace(options, **changed)
