"""The same prompts on several engines, each plainly and with what was tuned for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from adaptspec.engines.inference_engine import EngineOptions, InferenceEngine
from adaptspec.errors import AdaptSpecError, UnknownStrategyError, stopped_by_user
from adaptspec.profile import PLAIN, ClassChoice, Environment, ProfileStore
from adaptspec.selector import rank, select
from adaptspec.workloads import Prompt, Workload
from adaptspec_tuner.engines.as_tuned import as_decided, as_tuned
from adaptspec_tuner.engines.comparison import Cell, Comparison, Row
from adaptspec_tuner.engines.measurer import EngineMeasurer
from adaptspec_tuner.measuring.profiler import (
    PLAIN_SETTING,
    Sample,
    Setting,
    in_a_line,
)
from adaptspec_tuner.searching.space import defaults

if TYPE_CHECKING:
    from adaptspec.host import Host

TUNED = "tuned"


@dataclass
class _Compared:
    """An engine that answers.

    Args:
        ways: Way -> the setting of each class.
        samples: Way and class -> prompt's id -> what its answer took.
        finished: Classes that it went through.
        refused: Prompt's id -> why it isn't decoded plainly.
        failed: Setting's key and class -> why it isn't asked there any more.
        notes: Why classes are decoded plainly where tuned choices are used, and what is
            to be known of the choices.
    """

    name: str
    engine: InferenceEngine
    measurer: EngineMeasurer
    environment: Environment
    ways: dict[str, dict[str, Setting]]
    samples: dict[tuple[str, str], dict[str, Sample]] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def answered(self) -> bool:
        """Whether it went through a class in which it answers."""
        return any((PLAIN, name) in self.samples for name in self.finished)


def compare(
    asked: Sequence[EngineOptions],
    workload: Workload,
    store: ProfileStore | None,
    host: Host,
    *,
    methods: Sequence[str] = (),
    max_new_tokens: int = 64,
    doing: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Comparison:
    """Answer every prompt with every engine, prompt by prompt in turns.

    An engine without room for its settings answers a class at once, setting by setting.

    An engine that can't be opened, or that fails before it went through a class, is
    told and left out. One that fails later keeps the classes that it went through, and
    a way of decoding those in which it didn't fail. A prompt that an engine refuses is
    left out on all of them. What isn't said of an engine is as it was when its model
    was tuned.

    Args:
        asked: The engines with their models.
        store: Where tuned choices are; None: none are.
        methods: Also measured with their defaults, on the engines that have them.
        sleep: Waits for seconds, until an engine that was asked leaves the cores to
            the next one.

    Raises:
        UnknownStrategyError: for a method that no engine has.
    """
    found = Comparison(workload.name)
    with contextlib.ExitStack() as stack:
        compared: list[_Compared] = []
        for options in asked:
            doing(f"opening {options.engine}")
            with _told(found.left_out, options.engine, warn):
                compared.append(
                    _opened(
                        stack, options, workload, store, host, methods, max_new_tokens
                    )
                )
                sleep(compared[-1].engine.resting)
        if compared:
            _check_methods(methods, compared, found.left_out)
        ended: dict[str, str] = {}  # engine -> why it is asked no more
        for name, prompts in workload.by_class().items():
            for one in [c for c in compared if c.name not in ended]:
                doing(f"{name}: {one.name}")
                with _told(ended, one.name, warn):
                    settings = [of[name] for of in one.ways.values() if name in of]
                    others = [s for s in settings if s.strategy != PLAIN]
                    one.measurer.forget()
                    one.measurer.measure_ahead([(s, prompts) for s in others])
                    sleep(one.engine.resting)
            for prompt in prompts:
                for one in [c for c in compared if c.name not in ended]:
                    doing(f"{name}: {one.name}")
                    with _told(ended, one.name, warn):
                        _answered(one, prompt)
                        sleep(one.engine.resting)
            for one in [c for c in compared if c.name not in ended]:
                one.finished.append(name)
        _sum_up(found, compared, ended, workload)
    return found


def _sum_up(
    found: Comparison,
    compared: Sequence[_Compared],
    ended: Mapping[str, str],
    workload: Workload,
) -> None:
    """Rows and notes of what was measured, the engines first that went to the end.

    A way of decoding is told in a class where it answered all of its prompts that no
    engine refuses, since prompts differ.
    """
    for one in compared:
        whys = [why for name, why in ended.items() if name == one.name]
        whys += one.refused.values()
        if whys and not one.answered:
            found.left_out[one.name] = whys[0]
    compared = [one for one in compared if one.name not in found.left_out]
    compared.sort(key=lambda one: one.name in ended)
    classes = workload.by_class()
    refused: set[str] = set()
    for one in compared:
        for prompt in (p for name in one.finished for p in classes[name]):
            if prompt.id in one.refused and prompt.id not in refused:
                refused.add(prompt.id)
                found.notes.append(
                    f"prompt {prompt.id!r} is left out on all engines: {one.name}: "
                    f"{one.refused[prompt.id]}"
                )
    for one in compared:
        version = one.environment.versions.get(one.environment.engine, "")
        failed: dict[tuple[str, str], list[str]] = {}  # way and why -> classes
        for way, by_class in one.ways.items():
            row = Row(one.name, version, way)
            for name in one.finished:
                samples = one.samples.get((way, name), {})
                kept = [p.id for p in classes[name] if p.id not in refused]
                if kept and samples.keys() >= set(kept):
                    row.cells[name] = _cell(by_class[name], [samples[k] for k in kept])
                elif why := one.failed.get((by_class[name].key, name)):
                    failed.setdefault((way, why), []).append(name)
            if row.cells:
                found.rows.append(row)
                found.engines[one.name] = one.environment
        notes = [*one.notes, *getattr(one.engine, "notes", ())]
        for (way, why), names in failed.items():
            notes.append(f"{way} is left out in {', '.join(names)}: {why}")
        if one.name in ended:
            missing = [name for name in classes if name not in one.finished]
            notes.append(f"left out in {', '.join(missing)}: {ended[one.name]}")
        found.notes += [f"{one.name}: {note}" for note in notes]


def _opened(
    stack: contextlib.ExitStack,
    options: EngineOptions,
    workload: Workload,
    store: ProfileStore | None,
    host: Host,
    methods: Sequence[str],
    max_new_tokens: int,
) -> _Compared:
    from adaptspec_tuner.engines.tune import engine_class

    cls, asked = engine_class(host, options.engine), options
    if store is not None:
        options = as_tuned(asked, store)
    engine = stack.enter_context(cls.open(options))
    choices: list[ClassChoice] = []
    if store is not None:
        choices = store.choices(model=engine.environment.model)
        runs: dict[str, list[str]] = {}
        for name in workload.classes:
            run = select(choices, engine.environment, name).run
            runs.setdefault(run, []).append(name)
        # Not the newest run may have decided, but one that ran the engine otherwise.
        if (then := as_decided(asked, store, runs)) != options:
            engine.close()
            options = then
            engine = stack.enter_context(cls.open(options))
    environment = engine.environment
    known = {method.name: method for method in engine.methods}
    ways: dict[str, dict[str, Setting]] = {
        PLAIN: dict.fromkeys(workload.classes, PLAIN_SETTING)
    }
    tuned: dict[str, Setting] = {}
    said: dict[str, list[str]] = {}  # what is to be known of a choice -> classes
    for name in workload.classes:
        ranking = rank(choices, environment, name)
        choice = ranking.choices[0]
        if choice.strategy != PLAIN and choice.strategy in known:
            tuned[name] = Setting(choice.strategy, dict(choice.params))
            # Without how much faster it was: that is measured here.
            if ranking.notes:
                said.setdefault("; ".join(ranking.notes), []).append(name)
            continue
        reason = choice.reason
        if choice.strategy != PLAIN:
            why = _lacks(engine, choice.strategy)
            reason = f"plain decoding: {choice.strategy} was chosen, but {why}"
        said.setdefault(reason, []).append(name)
    if tuned:
        # A class that is best decoded plainly is decoded plainly.
        ways[TUNED] = {
            name: tuned.get(name, PLAIN_SETTING) for name in workload.classes
        }
    for name in methods:
        if name in known and name != PLAIN:
            setting = Setting(name, defaults(known[name].Params))
            ways[name] = dict.fromkeys(workload.classes, setting)
    lacking = {name: _lacks(engine, name) for name in methods}
    measurer = EngineMeasurer(engine, [workload], max_new_tokens, options.concurrency)
    measurer.check()
    notes = [f"{', '.join(of)}: {reason}" for reason, of in said.items()]
    notes += [f"not measured: {name}: {why}" for name, why in lacking.items() if why]
    found = _Compared(options.engine, engine, measurer, environment, ways)
    found.notes.extend(notes)
    return found


def _lacks(engine: InferenceEngine, method: str) -> str | None:
    """Why an engine can't decode with a method; None: it can."""
    if any(method == known.name for known in engine.methods):
        return None
    return engine.unavailable.get(method, "the engine doesn't have it")


def _check_methods(
    names: Sequence[str], compared: Sequence[_Compared], left_out: Mapping[str, str]
) -> None:
    """Refuse a method that no engine has.

    Args:
        left_out: Engine that can't be opened -> why.

    Raises:
        UnknownStrategyError: with the reason of each engine, and what there is.
    """
    for name in names:
        reasons = {one.name: _lacks(one.engine, name) for one in compared}
        if None not in reasons.values():
            reasons |= {engine: f"left out: {why}" for engine, why in left_out.items()}
            told = "; ".join(f"{engine}: {why}" for engine, why in reasons.items())
            known = [m.name for one in compared for m in one.engine.methods]
            raise UnknownStrategyError(
                f"--method must be one that an engine at hand has, got {name!r}; "
                f"{told}; they have: {', '.join(dict.fromkeys(known))}"
            )


def _answered(one: _Compared, prompt: Prompt) -> None:
    """Answer a prompt with each of an engine's settings, each once.

    A setting that fails is asked no more in the prompt's class.

    Raises:
        Exception: what the engine raised, unless it refuses this prompt alone.
    """
    name = prompt.prompt_class
    taken: dict[str, Sample] = {}
    try:
        taken[PLAIN_SETTING.key] = one.measurer.measure(PLAIN_SETTING, prompt)
    # A third party's engine may raise anything.
    except Exception as error:
        if stopped_by_user(error):
            raise
        try:
            one.measurer.check()
        except AdaptSpecError:
            raise error from None
        one.refused[prompt.id] = in_a_line(error)
        return
    for way, settings in one.ways.items():
        setting = settings[name]
        if setting.key not in taken and (setting.key, name) not in one.failed:
            try:
                taken[setting.key] = one.measurer.measure(setting, prompt)
            # Whether it was the engine, the next plain answer tells.
            except Exception as error:
                if stopped_by_user(error):
                    raise
                one.failed[setting.key, name] = in_a_line(error)
        if setting.key in taken:
            one.samples.setdefault((way, name), {})[prompt.id] = taken[setting.key]


@contextlib.contextmanager
def _told(
    left_out: dict[str, str], engine: str, warn: Callable[[str], None]
) -> Iterator[None]:
    """Leave out an engine that fails, and say why."""
    try:
        yield
    # A third party's engine may raise anything.
    except Exception as error:
        if stopped_by_user(error):
            raise
        left_out[engine] = in_a_line(error)
        if not isinstance(error, AdaptSpecError):
            warn(f"{engine} is left out: {in_a_line(error)}")


def _cell(setting: Setting, samples: Sequence[Sample]) -> Cell:
    return Cell(
        setting.strategy,
        dict(setting.params),
        median(sample.speed for sample in samples),
        median(sample.seconds_to_first for sample in samples),
        median(s.seconds / max(1, len(s.tokens)) for s in samples),
        len(samples),
    )
