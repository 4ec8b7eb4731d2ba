"""The same prompts on several engines, each plainly and with what was tuned for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

from adaptspec.engines.exporting.options import Asked, tuned_with
from adaptspec.engines.inference_engine import EngineOptions, InferenceEngine
from adaptspec.errors import (
    AdaptSpecError,
    EngineError,
    UnknownStrategyError,
    stopped_by_user,
)
from adaptspec.profile import PLAIN, Environment, ProfileStore
from adaptspec.selector import select
from adaptspec.workloads import Prompt, Workload
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


@dataclass(frozen=True)
class Cell:
    """An engine's row in one class.

    Args:
        setting: The method that it decoded with.
        params: Its parameters.
        tokens_per_second: After the first token; median over prompts.
        seconds_to_first: Median over prompts.
        seconds_per_token: Of the whole answer, the prompt's reading included; median.
    """

    setting: str
    params: Mapping[str, Any]
    tokens_per_second: float
    seconds_to_first: float
    seconds_per_token: float
    prompts: int


@dataclass
class Row:
    """An engine with a way of decoding: plainly, tuned, or a method with its defaults.

    Args:
        cells: Class -> what was measured.
    """

    engine: str
    version: str
    way: str
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For people."""
        how = "plain decoding" if self.way == PLAIN else self.way
        return f"{self.engine}: {how}"

    def ratio(self, base: Row) -> float | None:
        """How many times as fast as ``base`` a token of an answer comes: geometric mean
        over the classes that both have."""
        ratios = [
            base.cells[name].seconds_per_token / cell.seconds_per_token
            for name, cell in self.cells.items()
            if name in base.cells and cell.seconds_per_token > 0
        ]
        return geometric_mean(ratios) if ratios else None


@dataclass
class Comparison:
    """What was measured.

    Args:
        left_out: Engine -> why it isn't compared.
    """

    workload: str
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        told = asdict(self)
        for row, of in zip(told["rows"], self.rows, strict=True):
            row["ratio"] = of.ratio(self.rows[0])
        return told


@dataclass
class _Compared:
    """An engine that answers.

    Args:
        ways: Way -> the setting of each class.
        samples: Way and class -> prompt's id -> what its answer took.
        refused: Prompt's id -> why it isn't decoded plainly.
        notes: Why classes are decoded plainly where tuned choices are used.
    """

    name: str
    engine: InferenceEngine
    measurer: EngineMeasurer
    environment: Environment
    ways: dict[str, dict[str, Setting]]
    samples: dict[tuple[str, str], dict[str, Sample]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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

    An engine that can't be opened, or that fails on its way, is told and left out; so
    is a prompt that an engine refuses, on all of them. What isn't said of an engine is
    as it was when its model was tuned.

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
            with _told(found, options.engine, warn):
                compared.append(
                    _opened(
                        stack, options, workload, store, host, methods, max_new_tokens
                    )
                )
                sleep(compared[-1].engine.resting)
        if compared:
            _check_methods(methods, compared)
        for name, prompts in workload.by_class().items():
            for one in [c for c in compared if c.name not in found.left_out]:
                doing(f"{name}: {one.name}")
                with _told(found, one.name, warn):
                    settings = [of[name] for of in one.ways.values() if name in of]
                    others = [s for s in settings if s.strategy != PLAIN]
                    one.measurer.forget()
                    one.measurer.measure_ahead([(s, prompts) for s in others])
                    sleep(one.engine.resting)
            for prompt in prompts:
                for one in [c for c in compared if c.name not in found.left_out]:
                    doing(f"{name}: {one.name}")
                    with _told(found, one.name, warn):
                        _answered(one, prompt)
                        sleep(one.engine.resting)
        for one in compared:
            if one.refused and not one.samples:
                found.left_out.setdefault(one.name, next(iter(one.refused.values())))
        compared = [c for c in compared if c.name not in found.left_out]
        refused = {key: (c, why) for c in compared for key, why in c.refused.items()}
        for prompt_id, (by, why) in refused.items():
            found.notes.append(
                f"prompt {prompt_id!r} is left out on all engines: {by.name}: {why}"
            )
        for one in compared:
            version = one.environment.versions.get(one.environment.engine, "")
            for way, by_class in one.ways.items():
                row = Row(one.name, version, way)
                for name, setting in by_class.items():
                    samples = one.samples.get((way, name), {})
                    if kept := [s for key, s in samples.items() if key not in refused]:
                        row.cells[name] = _cell(setting, kept)
                if row.cells:
                    found.rows.append(row)
            for note in (*one.notes, *getattr(one.engine, "notes", ())):
                found.notes.append(f"{one.name}: {note}")
    return found


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

    if store is not None:
        options = as_tuned(options, store)
    engine = stack.enter_context(engine_class(host, options.engine).open(options))
    environment = engine.environment
    known = {method.name: method for method in engine.methods}
    ways: dict[str, dict[str, Setting]] = {
        PLAIN: dict.fromkeys(workload.classes, PLAIN_SETTING)
    }
    choices = [] if store is None else store.choices(model=environment.model)
    tuned: dict[str, Setting] = {}
    plainly: dict[str, list[str]] = {}  # why -> classes
    for name in workload.classes:
        choice = select(choices, environment, name)
        if choice.strategy != PLAIN and choice.strategy in known:
            tuned[name] = Setting(choice.strategy, dict(choice.params))
            continue
        reason = choice.reason
        if choice.strategy != PLAIN:
            why = _lacks(engine, choice.strategy)
            reason = f"plain decoding: {choice.strategy} was chosen, but {why}"
        plainly.setdefault(reason, []).append(name)
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
    notes = [f"{', '.join(of)}: {reason}" for reason, of in plainly.items()]
    notes += [f"not measured: {name}: {why}" for name, why in lacking.items() if why]
    found = _Compared(options.engine, engine, measurer, environment, ways)
    found.notes.extend(notes)
    return found


def _lacks(engine: InferenceEngine, method: str) -> str | None:
    """Why an engine can't decode with a method; None: it can."""
    if any(method == known.name for known in engine.methods):
        return None
    return engine.unavailable.get(method, "the engine doesn't have it")


def _check_methods(names: Sequence[str], compared: Sequence[_Compared]) -> None:
    """Refuse a method that no engine has.

    Raises:
        UnknownStrategyError: with the reason of each engine, and what there is.
    """
    for name in names:
        reasons = {one.name: _lacks(one.engine, name) for one in compared}
        if None not in reasons.values():
            told = "; ".join(f"{engine}: {why}" for engine, why in reasons.items())
            known = [m.name for one in compared for m in one.engine.methods]
            raise UnknownStrategyError(
                f"--method must be one that an engine at hand has, got {name!r}; "
                f"{told}; they have: {', '.join(dict.fromkeys(known))}"
            )


def as_tuned(options: EngineOptions, store: ProfileStore) -> EngineOptions:
    """What isn't said of an engine as it was when its model was tuned: a choice holds
    for the draft model, heads and numbers that it was measured with."""
    choices = [c for c in store.choices() if c.environment.engine == options.engine]
    try:
        asked = Asked(model=options.model, concurrency=options.concurrency)
        told = tuned_with(asked, store, choices)
    except EngineError:  # of several models it isn't clear which is meant
        return options
    if told.get("model") is not None and options.model is None:
        return options
    names = {
        "command": "engine_command",
        "python": "engine_python",
        "arguments": "engine_argument",
    }
    usual = EngineOptions()
    changed: dict[str, Any] = {}
    for one in fields(EngineOptions):
        value = told.get(names.get(one.name, one.name))
        if value and getattr(options, one.name) == getattr(usual, one.name):
            changed[one.name] = tuple(value) if isinstance(value, list) else value
    return replace(options, **changed)


def _answered(one: _Compared, prompt: Prompt) -> None:
    """Answer a prompt with each of an engine's settings, each once.

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
        if setting.key not in taken:
            taken[setting.key] = one.measurer.measure(setting, prompt)
        one.samples.setdefault((way, name), {})[prompt.id] = taken[setting.key]


@contextlib.contextmanager
def _told(
    found: Comparison, engine: str, warn: Callable[[str], None]
) -> Iterator[None]:
    """Leave out an engine that fails, and say why."""
    try:
        yield
    # A third party's engine may raise anything.
    except Exception as error:
        if stopped_by_user(error):
            raise
        found.left_out[engine] = in_a_line(error)
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
