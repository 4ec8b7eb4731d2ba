"""How an engine was told to run when it was tuned, unless it is said anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.errors import EngineError
from adaptspec.profile import ClassChoice, ProfileStore
from adaptspec.run_records import USAGE, from_anywhere


@dataclass(frozen=True)
class Asked:
    """What a user says of an engine; what is None is as it was when it was tuned."""

    model: str | None = None
    draft_model: str | None = None
    heads: Sequence[str] = ()
    engine_command: str | None = None
    engine_python: str | None = None
    concurrency: int | None = None


def options_of(
    engine: str, asked: Asked, store: ProfileStore, choices: Sequence[ClassChoice]
) -> EngineOptions:
    """What an engine is opened with.

    Args:
        choices: Of the engine, newest first; a pinned run counts before others.

    Raises:
        EngineError: if it isn't clear which model or how many requests are meant.
    """
    given = {name: value for name, value in vars(asked).items() if value}
    told = from_anywhere({**tuned_with(asked, store, choices), **given})
    return EngineOptions(
        engine=engine,
        model=told.get("model"),
        draft_model=told.get("draft_model"),
        heads=tuple(told["heads"]),
        command=told.get("engine_command"),
        python=told.get("engine_python"),
        arguments=tuple(told.get("engine_argument") or ()),
        dtype=told.get("dtype") or "auto",
        device=told.get("device"),
        threads=told.get("threads"),
        batch_threads=told.get("batch_threads"),
        context=told.get("context"),
        concurrency=told.get("concurrency") or 1,
        trust_remote_code=bool(told.get("trust_remote_code")),
    )


def tuned_with(
    asked: Asked, store: ProfileStore, choices: Sequence[ClassChoice]
) -> Mapping[str, Any]:
    """The record of the newest run of the model and the number of requests asked for.

    Empty where none is kept.

    Raises:
        EngineError: if several models or numbers of requests were measured, and none
            was asked for.
    """
    runs = {c.run: c for c in choices}
    order = sorted(runs, key=lambda run: (runs[run].pinned, runs[run].created))
    records = [
        record
        for run in reversed(order)
        if (record := store.record(run, USAGE)) is not None
        and (asked.model is None or _same(record.get("model"), asked.model))
    ]
    models = {str(record.get("model")): None for record in records}
    if asked.model is None and len(models) > 1:
        raise EngineError(
            f"{len(models)} models were measured ({', '.join(models)}); say which: "
            "--model MODEL"
        )
    numbers = sorted({int(record.get("concurrency") or 1) for record in records})
    if asked.concurrency is not None:
        records = [
            record
            for record in records
            if (record.get("concurrency") or 1) == asked.concurrency
        ]
    elif len(numbers) > 1:
        known = ", ".join(map(str, numbers))
        raise EngineError(
            f"measured with {known} requests at a time; say how many the server will "
            "have: --concurrency N"
        )
    return records[0] if records else {}


def _same(one: Any, other: str) -> bool:
    """Whether two names are of one model."""
    if not isinstance(one, str):
        return False
    return one == other or Path(one).resolve() == Path(other).resolve()
