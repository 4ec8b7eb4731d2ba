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


def options_of(engine: str, asked: Asked, usage: Mapping[str, Any]) -> EngineOptions:
    """What an engine is opened with.

    Args:
        usage: The record of how it was tuned; empty where none is kept.
    """
    given = {name: value for name, value in vars(asked).items() if value}
    programs = ("engine_command", "engine_python")
    if given.keys() & set(programs):  # the other one named another installation
        usage = {k: value for k, value in usage.items() if k not in programs}
    told = from_anywhere({**usage, **given})
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
        runs_here=False,
    )


def records_of(
    asked: Asked, store: ProfileStore, choices: Sequence[ClassChoice]
) -> dict[str, Mapping[str, Any]]:
    """Run -> the record of how it was asked for, of runs of the model asked for.

    A pinned run goes before others, then the newest. A run whose record wasn't kept is
    left out.

    Args:
        choices: Of one engine.
    """
    runs = {c.run: c for c in choices}
    order = sorted(runs, key=lambda run: (runs[run].pinned, runs[run].created))
    return {
        run: record
        for run in reversed(order)
        if (record := store.record(run, USAGE)) is not None
        and (asked.model is None or _same(record.get("model"), asked.model))
    }


def tuned_with(
    asked: Asked, store: ProfileStore, choices: Sequence[ClassChoice]
) -> Mapping[str, Any]:
    """The record of the newest run of the model and the number of requests asked for.

    Empty where none is kept.

    Args:
        choices: Of one engine; a pinned run counts before others.

    Raises:
        EngineError: if several models or numbers of requests were measured, and none
            was asked for, or another number of requests was.
    """
    records = list(records_of(asked, store, choices).values())
    models = {record.get("model") or "the default model": None for record in records}
    if asked.model is None and len(models) > 1:
        raise EngineError(
            f"{len(models)} models were measured ({', '.join(models)}); say which: "
            "--model MODEL"
        )
    numbers = sorted({int(record.get("concurrency") or 1) for record in records})
    known = ", ".join(map(str, numbers))
    if asked.concurrency is not None:
        if numbers and asked.concurrency not in numbers:
            raise EngineError(
                "--concurrency must be a number of requests at a time that was "
                f"measured, which are {known}, got {asked.concurrency}; give one of "
                f"them, or tune with --concurrency {asked.concurrency}"
            )
        records = [
            record
            for record in records
            if (record.get("concurrency") or 1) == asked.concurrency
        ]
    elif len(numbers) > 1:
        raise EngineError(
            f"measured with {known} requests at a time; say how many the server will "
            "have: --concurrency N"
        )
    return records[0] if records else {}


def decided_with(
    store: ProfileStore, classes_of: Mapping[str, Sequence[str]]
) -> tuple[Mapping[str, Any], list[str]]:
    """The record of the run that decided most classes, empty where none is kept, and
    which classes another one decided that ran the engine otherwise, in sentences.

    Where several runs decided, the context is the longest of them, and models that
    only others of them had are added.

    Args:
        classes_of: Run -> the classes that it decided.
    """
    order = sorted(classes_of, key=lambda run: -len(classes_of[run]))
    records = {run: found for run in order if (found := store.record(run, USAGE))}
    if not records:
        return {}, []
    first, *others = records
    told = dict(records[first])
    for name in ("draft_model", "heads"):
        told[name] = next((r[name] for r in records.values() if r.get(name)), None)
    contexts = [int(record.get("context") or 0) for record in records.values()]
    told["context"] = max(contexts) if all(contexts) else None
    notes = []
    for run in others:
        then, now = _ran(records[run]), _ran(told)
        differing = [
            f"{name} {value}" for name, value in then.items() if value != now[name]
        ]
        if differing:
            notes.append(
                f"{', '.join(classes_of[run])}: measured in run {run} with "
                f"{', '.join(differing)}, unlike these flags; --run {run} prints those."
            )
    return told, notes


def _ran(usage: Mapping[str, Any]) -> dict[str, str]:
    """What of how an engine was run changes its speed, by the option's name."""
    threads = usage.get("threads")
    told = {
        "--threads": threads,
        "--batch-threads": usage.get("batch_threads") or threads,
        "--engine-argument": " ".join(usage.get("engine_argument") or ()),
    }
    return {name: str(value or "left out") for name, value in told.items()}


def _same(one: Any, other: str) -> bool:
    """Whether two names are of one model."""
    if not isinstance(one, str):
        return False
    return one == other or Path(one).resolve() == Path(other).resolve()
