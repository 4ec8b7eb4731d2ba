"""An engine that only says how it is started, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, ClassVar

from adaptspec.engines.inference_engine import (
    PLAIN_METHOD,
    Answer,
    EngineOptions,
    InferenceEngine,
    Launch,
    Method,
)
from adaptspec.hookspecs import hookimpl
from adaptspec.params import DraftingParams, Scalar
from adaptspec.profile import (
    ANSWER,
    EVERY_CLASS,
    PLAIN,
    ClassChoice,
    Environment,
    Measurement,
    Pick,
    Profile,
    ProfileStore,
)
from adaptspec.workloads import Prompt

DAY = datetime(2026, 11, 30, tzinfo=timezone.utc)
HERE = Environment(
    *("m1", "target", None, None, "bfloat16", "cpu", "A CPU", 2),
    versions={"adaptspec": "0.4.0", "llama.cpp": "1234"},
    configuration="c1",
    engine="llama.cpp",
)


class FakeEngine(InferenceEngine):
    """Named as the real one; what it was opened with is kept."""

    name = "llama.cpp"
    summary = "says how it would be started"
    opened: ClassVar[list[EngineOptions]] = []
    here: ClassVar[Environment] = HERE
    closed: ClassVar[int] = 0

    def __init__(self, options: EngineOptions) -> None:
        self._options = options

    @classmethod
    def open(cls, options: EngineOptions) -> FakeEngine:
        cls.opened.append(options)
        return cls(options)

    @property
    def environment(self) -> Environment:
        draft = "d1" if self._options.draft_model else None
        return replace(self.here, draft=draft, concurrency=self._options.concurrency)

    @property
    def methods(self) -> Sequence[Method]:
        names = ["ngram_simple", "ngram_mod"]
        names += ["draft_simple"] if self._options.draft_model else []
        drafting = [Method(name, "drafts", DraftingParams) for name in names]
        return [PLAIN_METHOD, *drafting]

    @property
    def unavailable(self) -> Mapping[str, str]:
        return {"draft_simple": "needs a draft model: --draft-model"}

    def answer(
        self,
        method: str,
        params: Mapping[str, Scalar],
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> list[Answer]:
        raise AssertionError("an export asks nothing")

    def launch(self, method: str, params: Mapping[str, Scalar]) -> Launch:
        words = [f"--{name}={value}" for name, value in params.items()]
        told = [] if method == PLAIN else ["--spec-type", method, *words]
        return Launch(
            ["llama-server", "-m", str(self._options.model), *told],
            {"OMP_NUM_THREADS": "2"},
            {"type": method},
            ["It can't choose\nby class."],
        )

    def close(self) -> None:
        type(self).closed += 1


class FakeEngines:
    """The plugin that brings it."""

    @hookimpl
    def register_engines(self) -> Sequence[type[InferenceEngine]]:
        return [FakeEngine]


def measurement(
    ratio: float, seconds: float, first: float = 0.0, repeats: int = 1
) -> Measurement:
    """Of ten prompts with 100 tokens each, with plain answers of so many seconds after
    the first token. Tokens are counted over all repeats, as a tune does."""
    rest = (first + seconds) / ratio - first
    return Measurement(
        *(99 / max(rest, 1e-9), 1.0, 2.0, ratio, ratio, ratio, 1.5, 0.5),
        *(10, 1000 * repeats, 10, 0, 1.0, 0.0, 0.0),
        interval_low=ratio * 0.9,
        interval_high=ratio * 1.1,
        objective=ANSWER,
        seconds_to_first=first,
    )


Measured = Mapping[str, tuple[float, Mapping[tuple[str, int], float]]]


def keep_run(
    store: ProfileStore,
    measured: Measured,
    *,
    run: str = "r1",
    environment: Environment = HERE,
    prompts: Mapping[str, int] | None = None,
    length: str = "draft_length",
    mix: Mapping[str, int] | None = None,
    repeats: Mapping[str, int] | None = None,
    created: datetime = DAY,
    **record: Any,
) -> None:
    """Store a run: class -> seconds of a plain answer, and the ratio of each setting,
    which is a method and its draft length. Settings above 1.1 are picked, the best
    first; over all classes those that are it in every class.

    Args:
        mix: Prompts of the workload by class.
        repeats: How often each prompt was measured, by class; once otherwise.
    """
    profiles, choices = [], []
    for name, (seconds, ratios) in measured.items():
        times = (repeats or {}).get(name, 1)
        speeds = {f'["{PLAIN}", {{}}]': [1.0] * times, '["another", {}]': [1.0]}
        confirmed = {"prompts": {f"p{n}": speeds for n in range(10)}}
        store.put_record(run, f"confirm/{name}", confirmed)
        for (method, tokens), ratio in {(PLAIN, 0): 1.0, **ratios}.items():
            profiles.append(
                Profile(
                    *(environment, "w1", "mine", name, method),
                    {} if method == PLAIN else {length: tokens},
                    measurement(ratio, seconds, repeats=times),
                    created,
                    run=run,
                )
            )
        picks = [
            Pick(
                *(method, {length: tokens}, f"{ratio:.2f}x", ratio),
                *(ratio * 0.9, ratio * 1.1),
                needs_draft="draft" in method,
            )
            for (method, tokens), ratio in sorted(
                ratios.items(), key=lambda item: -item[1]
            )
            if ratio > 1.1
        ]
        count = (prompts or {}).get(name, 10)
        choices.append(
            ClassChoice(
                *(environment, run, name, created, picks, "nothing is faster", count),
                objective=ANSWER,
            )
        )
    store.add_profiles(profiles)
    store.put_choices(choices)
    if EVERY_CLASS not in measured:
        every = ClassChoice(
            *(
                environment,
                run,
                EVERY_CLASS,
                created,
                [],
                "no one setting is faster",
                10,
            ),
            objective=ANSWER,
        )
        store.put_choices([every])
    if mix is not None:
        store.put_record(run, "mix", mix)
    store.put_record(run, "usage", {"model": "target.gguf", **record})
