"""One tune of an inference engine: what it is given, from options to a result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adaptspec.cli.progress import Progress
from adaptspec.engines.inference_engine import EngineOptions, InferenceEngine, Method
from adaptspec.errors import AdaptSpecError, EngineError, UnknownStrategyError
from adaptspec.profile import ANSWER, LATENCY, OURS, PLAIN, ProfileStore
from adaptspec.workloads import Workload, split
from adaptspec_tuner.engines.measurer import EngineMeasurer
from adaptspec_tuner.engines.threads import environment_at, settle_threads
from adaptspec_tuner.measuring.prompts import measurable
from adaptspec_tuner.options import (
    TuneOptions,
    asked_prompts,
    check_store,
    opened_store,
)
from adaptspec_tuner.phases import tune_with
from adaptspec_tuner.reporting.usage import Usage
from adaptspec_tuner.tuning_run import TuneInputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptspec.host import Host
    from adaptspec_tuner.reporting.result import TuneResult

SERVER = "openai"  # the engine that asks a server by its URL
# Of several requests at a time.
WAVE = (
    "Requests that are measured together start together, and none follows where one is "
    "answered: under a steady load speculation may gain less than this says."
)


def engine_class(host: Host, name: str) -> type[InferenceEngine]:
    """The engine of a name, or the one that asks the server at a URL.

    Raises:
        EngineError: with the names there are.
    """
    wanted = SERVER if "://" in name else name
    if wanted not in host.engines:
        known = ", ".join(sorted(host.engines))
        raise EngineError(f"no engine {name!r}; known: {known}, or a server's URL")
    return host.engines[wanted]


def engine_options(
    model: str | None, draft_model: str | None, options: TuneOptions
) -> EngineOptions:
    """What an engine is told of a tune's options."""
    return EngineOptions(
        engine=options.engine,
        model=model,
        draft_model=draft_model,
        heads=[str(folder) for folder in options.heads],
        command=options.engine_command,
        python=options.engine_python,
        arguments=tuple(options.engine_argument),
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        batch_threads=options.batch_threads,
        context=options.context,
        concurrency=options.concurrency,
        api_key=options.api_key,
        trust_remote_code=options.trust_remote_code,
    )


def refuse_options(options: TuneOptions) -> None:
    """Refuse what a tune of another engine can't honour.

    Raises:
        AdaptSpecError: naming the option and the way out.
    """
    usual = TuneOptions()
    problems = {
        "ray": "its trials run here",
        "worker": "its trials run in one process",
        "baselines": "`adaptspec compare` sets engines side by side",
        "max_memory": "the engine's memory isn't measured",
        "allow_lossy": "its methods are lossless or aren't offered",
        "temperature": "it is measured greedily",
        "top_k": "it is measured greedily",
        "top_p": "it is measured greedily",
        "control": "it is measured greedily",
    }
    for name, reason in problems.items():
        value = getattr(options, name)
        if value != getattr(usual, name) and value not in ([], ()):
            flag = f"--{name.replace('_', '-')}"
            raise AdaptSpecError(
                f"{flag} doesn't go with --engine {options.engine}: {reason}; leave "
                "it out"
            )
    if options.objective == LATENCY:
        raise AdaptSpecError(
            f"--objective {LATENCY} doesn't go with --engine {options.engine}: it "
            f"tells no latency of its tokens; take {ANSWER} or speed"
        )


def chosen_methods(
    engine: InferenceEngine, names: Sequence[str] | None
) -> tuple[list[Method], dict[str, str]]:
    """Those to be tried, plain decoding aside, and why others can't be.

    Raises:
        UnknownStrategyError: for a name that the engine doesn't know.
    """
    methods = {m.name: m for m in engine.methods if m.name != PLAIN and m.lossless}
    unavailable = dict(engine.unavailable)
    if names is None:
        return list(methods.values()), unavailable
    for name in names:
        if name != PLAIN and name not in methods and name not in unavailable:
            known = ", ".join([*methods, *unavailable]) or "plain decoding alone"
            raise UnknownStrategyError(
                f"{engine.name} has no method {name!r}; it has: {known}"
            )
    return (
        [methods[name] for name in dict.fromkeys(names) if name in methods],
        {name: why for name, why in unavailable.items() if name in names},
    )


def engine_notes(engine: InferenceEngine, progress: Progress) -> list[str]:
    """What the engine has to say of the figures."""
    told = list(engine.notes)
    for note in told:
        progress.say(note)
    return told


def tune_engine(
    model: str | None,
    draft_model: str | None,
    workload: Workload | Path | str | None,
    options: TuneOptions,
    *,
    db: str | ProfileStore | None = None,
    host: Host | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TuneResult:
    """Find the fastest method of ``options.engine`` for each class of ``workload``.

    Args:
        model: A file, folder or name, as the engine takes it.

    Raises:
        EngineError: where the engine can't be opened, or can't decode plainly.
        AdaptSpecError: as :func:`adaptspec_tuner.tune.tune` does.
    """
    started = clock()
    from adaptspec.host import Host

    host = host or Host.installed()
    progress = progress or Progress(None, clock)
    cls = engine_class(host, options.engine)
    refuse_options(options)
    workload = asked_prompts(workload, options.skip_bad)
    check_store(host, db, worker=False)  # before anything is started for it
    notes: list[str] = []
    with cls.open(engine_options(model, draft_model, options)) as engine:
        methods, unavailable = chosen_methods(engine, options.strategies)
        workload = measurable(
            workload,
            EngineMeasurer(engine, [workload], options.max_new_tokens),
            limit=options.limit,
            skip_bad=options.skip_bad,
            warn=notes.append,
        )
        measurer = EngineMeasurer(
            *(engine, split(workload), options.max_new_tokens, options.concurrency),
            clock=clock,
        )
        measurer.check()
        if engine.environment.engine == OURS and cls.name != OURS:
            raise EngineError(
                f"{cls.name} calls itself {OURS!r}; its environment must name the "
                "engine (a fault of the plugin)"
            )
        store = opened_store(host, db, worker=False)
        try:
            settled = settle_threads(engine, workload, store, options, progress)
            options = replace(options, **settled)
            if settled:
                notes.append(
                    f"threads, chosen by plain decoding: {settled['threads']} for "
                    f"single tokens, {settled['batch_threads']} for prompts and drafts"
                )
            starts = "://" not in options.engine and (
                cls.launch is not InferenceEngine.launch
            )
            usage = Usage.of(
                *(model, draft_model, options),
                *(db if db is None or isinstance(db, str) else store.url, starts),
            )
            result = tune_with(
                TuneInputs(
                    measurer,
                    methods,
                    workload,
                    store,
                    environment_at(engine, options),
                    options,
                    clock=clock,
                    progress=progress,
                    started=started,
                    unavailable=unavailable,
                    notes=notes,
                    usage=usage,
                )
            )
            if options.concurrency > 1 and result.classes:
                result.notes.insert(0, WAVE)
                progress.say(WAVE)
            # Before the tune's own: the last note may be why nothing was confirmed.
            result.notes[:0] = engine_notes(engine, progress)
            return result
        finally:
            if store is not db:
                store.close()
