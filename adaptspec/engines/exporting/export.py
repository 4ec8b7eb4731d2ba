"""The plan for an engine, from the profile store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptspec.classes.classifier import stored_record
from adaptspec.engines.exporting import sglang
from adaptspec.engines.exporting.measured import (
    Found,
    Setting,
    choices_of,
    found_here,
)
from adaptspec.engines.exporting.options import (
    Asked,
    decided_with,
    options_of,
    records_of,
    tuned_with,
)
from adaptspec.engines.exporting.plan import (
    Launches,
    Plan,
    by_class,
    for_class,
    for_mix,
)
from adaptspec.engines.exporting.sharing import shared
from adaptspec.engines.inference_engine import InferenceEngine
from adaptspec.errors import AdaptSpecError, EngineError
from adaptspec.profile import EVERY_CLASS, ClassChoice, Pick, ProfileStore

if TYPE_CHECKING:
    from adaptspec.engines.inference_engine import EngineOptions
    from adaptspec.host import Host

NAME_THE_RUN = (
    "name the run to translate with --run (`adaptspec profiles list` shows them)"
)


@dataclass(frozen=True)
class Wanted:
    """What is to be exported.

    Args:
        prompt_class: For this class alone; None: for all.
        mix: Class -> its share of the prompts; empty: as in the workload.
        split: Whether each setting that a class is fastest with has a server.
        port: Of the first server.
        run: Only what this tuning run decided.
    """

    asked: Asked = field(default_factory=Asked)
    prompt_class: str | None = None
    mix: Mapping[str, float] = field(default_factory=dict)
    split: bool = False
    port: int = 8000
    run: str | None = None


@dataclass(frozen=True)
class Exported:
    """A plan, and what goes with it.

    Args:
        files: The models' names: files, folders or hub names.
        classifier: The record of what tells a prompt's class; None where none is kept.
    """

    plan: Plan
    files: Sequence[str]
    classifier: Mapping[str, Any] | None


def export_for(
    engine: str, wanted: Wanted, host: Host, store: ProfileStore
) -> Exported:
    """What an engine is to be started with.

    Raises:
        EngineError: if it can't be told, in one line with the way out.
    """
    if engine == sglang.NAME:
        return _for_sglang(wanted, store)
    if engine not in host.engines:
        started = [
            name
            for name, cls in host.engines.items()
            if cls.launch is not InferenceEngine.launch
        ]
        known = ", ".join(sorted([*started, sglang.NAME]))
        raise EngineError(f"no engine {engine!r} to export for; there are: {known}")
    if host.engines[engine].launch is InferenceEngine.launch:
        raise EngineError(
            f"{engine} isn't started with flags: it decodes in the program that loads "
            "it; see `adaptspec generate` and `adaptspec export DIR`"
        )
    choices = choices_of(store, engine, wanted.run)
    options = options_of(engine, wanted.asked, tuned_with(wanted.asked, store, choices))
    with ExitStack() as stack:
        opened = stack.enter_context(host.engines[engine].open(options))
        found = found_here(store, choices, opened.environment, refused=_refused(opened))
        # Not the newest run may have decided, but one that ran the engine otherwise.
        usage, notes = _decided_with(store, found, wanted)
        if usage and (then := options_of(engine, wanted.asked, usage)) != options:
            options = then
            opened = stack.enter_context(host.engines[engine].open(options))
            found = found_here(
                store, found.decided(), opened.environment, refused=_refused(opened)
            )
        if options.threads is None and _use_threads(opened, options, found):
            found = found_here(
                store, found.decided(), opened.environment, refused=_refused(opened)
            )
        found = replace(found, notes=[*found.notes, *notes])
        plan = _plan(found, wanted, lambda s: opened.launch(s.method, s.params), engine)
    return Exported(plan, _files(options), _classifier(store, choices, found))


def _for_sglang(wanted: Wanted, store: ProfileStore) -> Exported:
    """Another engine's profiles, in SGLang's words."""
    source, choices = _source(wanted, store)
    found = found_here(
        store,
        choices,
        choices[0].environment,
        refused=lambda pick: sglang.untranslatable(
            source, Setting.of(pick.strategy, pick.params)
        ),
    )
    decisive, notes = _decided_with(store, found, wanted)
    found = replace(found, notes=[*found.notes, *notes])
    options = options_of(source, wanted.asked, decisive)
    if decisive and options.model is None:  # the tune wasn't given one, either
        from adaptspec.default_model import default_model_path

        options = replace(options, model=str(default_model_path()))
    launches: Launches = lambda s: sglang.launch(source, s, options)  # noqa: E731
    plan = _plan(found, wanted, launches, sglang.NAME)
    return Exported(plan, _files(options), _classifier(store, choices, found))


def _source(wanted: Wanted, store: ProfileStore) -> tuple[str, list[ClassChoice]]:
    """The engine whose profiles are translated, and its choices for one model."""
    problem: EngineError | None = None
    for engine in sglang.FROM:
        try:
            choices = choices_of(store, engine, wanted.run)
        except EngineError as error:
            problem = problem or error
            continue
        if wanted.run is None:
            choices = _of_model(wanted.asked, store, choices)
        else:
            # It refuses another number of requests than the run's.
            tuned_with(replace(wanted.asked, model=None), store, choices)
        if choices:
            count = wanted.asked.concurrency
            loaded = [c for c in choices if c.environment.concurrency == count]
            choices = loaded or choices
            same = choices[0].environment.place()
            return engine, [c for c in choices if c.environment.place() == same]
        problem = EngineError(
            f"no tune of {' or '.join(sglang.FROM)} measured {wanted.asked.model}; "
            f"{NAME_THE_RUN}"
        )
    how = "SGLang isn't measured; what vLLM's or llama.cpp's tune found is translated, "
    raise EngineError(f"{how}and {problem}")


def _of_model(
    asked: Asked, store: ProfileStore, choices: Sequence[ClassChoice]
) -> list[ClassChoice]:
    """Those of the model that is asked for: of what runs that were given it found in
    it, or where no record names it, of what is called as it is.

    Raises:
        EngineError: if it isn't clear which one is meant.
    """
    tuned_with(asked, store, choices)  # it refuses what isn't clear
    runs = records_of(asked, store, choices)
    models = {c.environment.model for c in choices if c.run in runs}
    if not models:
        path = Path(asked.model or "")
        names = {path.name.removesuffix(".gguf"), path.resolve().name}
        models = {
            c.environment.model
            for c in choices
            if asked.model is None or Path(c.environment.model_name).name in names
        }
        if len(models) > 1:
            called = "" if asked.model is None else f" called {path.name}"
            raise EngineError(
                f"{len(models)} models{called} were measured; {NAME_THE_RUN}"
            )
    return [c for c in choices if c.environment.model in models]


def _decided_with(
    store: ProfileStore, found: Found, wanted: Wanted
) -> tuple[Mapping[str, Any], list[str]]:
    """How the engine was run when what is exported was decided."""
    runs: dict[str, list[str]] = {}
    decided = found.decided(wanted.prompt_class)
    named = [c for c in decided if c.prompt_class != EVERY_CLASS]
    for choice in named or decided:
        runs.setdefault(choice.run, []).append(choice.prompt_class)
    return decided_with(store, runs)


def _plan(found: Found, wanted: Wanted, launches: Launches, engine: str) -> Plan:
    if wanted.prompt_class is not None:
        return for_class(found, wanted.prompt_class, launches, wanted.port)
    plan = by_class if wanted.split else for_mix
    return shared(plan(found, wanted.mix, launches, wanted.port), engine)


def _refused(engine: InferenceEngine) -> Any:
    """Why a setting can't be used with the engine as it is here."""
    methods = {method.name: method for method in engine.methods}

    def refused(pick: Pick) -> str | None:
        method = methods.get(pick.strategy)
        if method is None:
            return engine.unavailable.get(
                pick.strategy, f"{engine.name} has no method {pick.strategy!r} here"
            )
        try:
            method.Params.parse(pick.params, pick.strategy)
        except AdaptSpecError as error:
            return str(error)
        return None

    return refused


def _use_threads(engine: InferenceEngine, options: EngineOptions, found: Found) -> bool:
    """Start it with the threads that were measured, where this machine has them.

    Returns:
        Whether they are others than the engine's own.
    """
    threads = found.environment.threads
    if threads == engine.environment.threads:
        return False
    try:
        engine.use_threads(threads, options.batch_threads or threads)
    except (NotImplementedError, EngineError):
        return False
    return True


def _files(options: EngineOptions) -> list[str]:
    """The models' names."""
    every = [options.model, options.draft_model, *options.heads]
    return [name for name in every if name is not None]


def _classifier(
    store: ProfileStore, choices: Sequence[ClassChoice], found: Found
) -> Mapping[str, Any] | None:
    """The record of the best classifier of the runs that are used."""
    return stored_record(store, [c for c in choices if c.run in found.runs])
