"""What the profile store knows of one engine, class by class."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from adaptspec.errors import EngineError
from adaptspec.params import Scalar
from adaptspec.profile import (
    ANSWER,
    EVERY_CLASS,
    OURS,
    PLAIN,
    ClassChoice,
    Environment,
    Measurement,
    Pick,
    ProfileStore,
)
from adaptspec.run_records import MIX, answers_of, confirmed_key
from adaptspec.selector import Ranking, decided_here, rank


@dataclass(frozen=True)
class Setting:
    """A speculative method with its parameters.

    Args:
        key: Tells settings apart.
    """

    method: str
    params: Mapping[str, Scalar] = field(default_factory=dict, compare=False)
    key: str = ""

    @classmethod
    def of(cls, method: str, params: Mapping[str, Scalar]) -> Setting:
        """A setting by its method and parameters."""
        return cls(method, dict(params), json.dumps(dict(params), sort_keys=True))

    @property
    def is_plain(self) -> bool:
        """Whether nothing is drafted."""
        return self.method == PLAIN

    def __str__(self) -> str:
        if self.is_plain:
            return "plain decoding"
        params = " ".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.method} ({params})" if params else self.method


PLAIN_SETTING = Setting.of(PLAIN, {})


@dataclass(frozen=True)
class ClassFound:
    """What was found for a class.

    Args:
        ranking: What may be used, the best first; plain decoding last.
        measured: Of each setting that was measured on the class's prompts.
        prompts: On how many prompts it rests.
        objective: What ratios are about, as of
            :class:`~adaptspec.profile.Measurement`.
        plain_answers: How many answers of plain decoding were measured, repeats
            counted; 0: it wasn't kept.
        asked: How many prompts of the workload are of the class, also those that
            weren't measured; None: it wasn't kept.
    """

    ranking: Ranking
    measured: Mapping[Setting, Measurement]
    prompts: int
    objective: str
    plain_answers: int = 0
    asked: int | None = None

    @property
    def settings(self) -> list[Setting]:
        """What may be used, the best first."""
        return [Setting.of(c.strategy, c.params) for c in self.ranking.choices]

    @property
    def best(self) -> Setting:
        """What the class's prompts are fastest with."""
        return self.settings[0]

    def ratio(self, setting: Setting) -> float | None:
        """How many times as fast as plain decoding; None where it wasn't measured."""
        if setting.is_plain:
            return 1.0
        found = self.measured.get(setting)
        return found.ratio if found is not None and found.ratio > 0 else None

    @property
    def plain_seconds(self) -> tuple[float, float] | None:
        """Of plain decoding: seconds to an answer's first token, and those after it.

        None where they weren't kept.
        """
        plain = self.measured.get(PLAIN_SETTING)
        if plain is None or not (self.plain_answers and plain.tokens_per_second > 0):
            return None
        first = plain.seconds_to_first or 0.0
        # The speed is that after the first token.
        following = max(0.0, plain.tokens / self.plain_answers - 1)
        return first, following / plain.tokens_per_second

    def seconds(self, setting: Setting) -> float | None:
        """Expected seconds of an answer; None where they can't be told."""
        ratio, plain = self.ratio(setting), self.plain_seconds
        if ratio is None or plain is None:
            return None
        first, rest = plain
        # Only the ratio of whole answers is about the first token, too.
        if self.objective == ANSWER:
            return (first + rest) / ratio
        return first + rest / ratio


@dataclass(frozen=True)
class Found:
    """What was found of an engine.

    Args:
        environment: What it was measured on.
        classes: Class -> what was found for it.
        everything: What was found over all classes; None where nothing was decided.
        runs: The tuning runs that it is from.
        notes: What else is to be known of all of it, in sentences.
    """

    environment: Environment
    classes: Mapping[str, ClassFound]
    everything: ClassFound | None
    runs: Sequence[str]
    notes: Sequence[str] = ()

    def told(self, prompt_class: str | None = None) -> list[str]:
        """What was left out and what else is to be known.

        Args:
            prompt_class: Of this class alone; None: of all, a class named where
                something isn't of all of them.
        """
        if prompt_class is not None:
            return [*self.notes, *self.classes[prompt_class].ranking.notes]
        classes = {name: of.ranking.notes for name, of in self.classes.items()}
        if self.everything is not None:
            classes["over all classes"] = self.everything.ranking.notes
        said = list(self.notes)
        for note in dict.fromkeys(n for notes in classes.values() for n in notes):
            names = [name for name, notes in classes.items() if note in notes]
            of_all = self.classes.keys() <= set(names)
            said.append(note if of_all else f"{', '.join(names)}: {note}")
        return said

    def decided(self, prompt_class: str | None = None) -> list[ClassChoice]:
        """The choices that it is made of, or the one of a class."""
        every = dict(self.classes)
        if self.everything is not None:
            every[EVERY_CLASS] = self.everything
        return [
            of.ranking.decided
            for name, of in every.items()
            if of.ranking.decided is not None and prompt_class in (None, name)
        ]


def choices_of(store: ProfileStore, engine: str, run: str | None) -> list[ClassChoice]:
    """What was decided of an engine, newest first.

    Args:
        run: Only this run's.

    Raises:
        EngineError: if there is nothing, with the command that measures.
    """
    every = store.choices()
    found = [choice for choice in every if choice.environment.engine == engine]
    if run is not None:
        found = [choice for choice in found if choice.run == run]
    if found:
        return found
    if run is not None:
        raise EngineError(
            f"run {run!r} decided nothing of {engine}; `adaptspec profiles list` shows "
            "the runs"
        )
    others = sorted({choice.environment.engine for choice in every})
    told = "nothing was measured of it yet"
    if others:
        names = ", ".join("our own" if name == OURS else name for name in others)
        told = f"what was measured of {names} decoding doesn't carry over"
    raise EngineError(
        f"{engine}: {told}; `adaptspec tune --engine {engine} --model MODEL` measures "
        "it"
    )


def found_here(
    store: ProfileStore,
    choices: Sequence[ClassChoice],
    environment: Environment,
    *,
    refused: Callable[[Pick], str | None] = lambda pick: None,
) -> Found:
    """What ``choices`` say of an engine and its models.

    What was measured on another machine serves as well: flags may be printed where
    they aren't used. It is told.

    Args:
        environment: The engine's as it is here.
        refused: Why a setting can't be used; None if it can.

    Raises:
        EngineError: if nothing was measured of this model, or only otherwise.
    """
    notes = []
    here = decided_here(choices, environment)
    if not here:
        for choice in choices:
            then = choice.environment
            moved = replace(
                environment, device_name=then.device_name, threads=then.threads
            )
            if here := decided_here(choices, moved):
                notes.append(
                    f"Measured on another machine: {then.device_name} (here "
                    f"{environment.device_name})."
                )
                environment = moved
                break
    if not here:
        reason = rank(choices, environment).choices[0].reason
        raise EngineError(
            f"{environment.engine}: {reason.removeprefix('plain decoding: ')}"
        )
    profiles = [
        profile
        for profile in store.profiles()
        if profile.environment.engine == environment.engine and not profile.baseline
    ]

    def of_class(name: str) -> ClassFound:
        ranking = rank(here, environment, name, refused=refused)
        decided = ranking.decided
        assert decided is not None
        measured = {
            Setting.of(profile.strategy, profile.params): profile.measurement
            for profile in reversed(profiles)  # the newest one counts
            if (profile.run, profile.prompt_class) == (decided.run, name)
        }
        confirmed = store.record(decided.run, confirmed_key(name))
        return ClassFound(
            *(ranking, measured, decided.prompts, decided.objective),
            answers_of(confirmed, PLAIN),
            (store.record(decided.run, MIX) or {}).get(name),
        )

    names = dict.fromkeys(choice.prompt_class for choice in here)
    classes = {name: of_class(name) for name in sorted(names) if name != EVERY_CLASS}
    everything = of_class(EVERY_CLASS) if EVERY_CLASS in names else None
    every = [*classes.values(), *([everything] if everything is not None else [])]
    runs = dict.fromkeys(of.ranking.decided.run for of in every if of.ranking.decided)
    measured_in = next(of.ranking.decided for of in every if of.ranking.decided)
    return Found(measured_in.environment, classes, everything, list(runs), notes)
