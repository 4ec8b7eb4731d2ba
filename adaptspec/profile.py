"""Value types of what was measured, and the store that keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from adaptspec.params import Scalar

PLAIN = "autoregressive"
OURS = "adaptspec"  # the engine that decodes in the program that loads it
# What settings are compared by.
ANSWER, SPEED, LATENCY = "answer", "speed", "latency"
EVERY_CLASS = "*"  # of results over all classes; no workload names a class so


@dataclass(frozen=True)
class Environment:
    """Where and on what a measurement was taken; profiles hold for one environment.

    Args:
        model: Digest of the target's weights and configuration.
        model_name: Its name for people.
        draft: Digest of the draft model, None without one.
        draft_name: Its name for people.
        dtype: Weights' type, e.g. ``bfloat16``.
        device: ``cpu``, ``cuda``...
        device_name: What the machine calls it.
        threads: Intra-op threads; 0: a server doesn't tell.
        versions: Package -> version (adaptspec, torch, transformers, python).
        heads: Digest of the trained heads attached to the target, None without any.
        heads_name: Their names for people.
        configuration: Digest of the target's configuration and buffers; None: an older
            version's, which kept none, as of the next two.
        kernel: What multiplies by the target's weights, whether they are packed, and
            whether in fixed shapes or graphs.
        attention: The target's attention implementation.
        engine: What decoded; its version is one of ``versions``.
        concurrency: Requests that were answered at the same time.
    """

    model: str
    model_name: str
    draft: str | None
    draft_name: str | None
    dtype: str
    device: str
    device_name: str
    threads: int
    versions: Mapping[str, str] = field(default_factory=dict)
    heads: str | None = None
    heads_name: str | None = None
    configuration: str | None = None
    kernel: str | None = None
    attention: str | None = None
    engine: str = OURS
    concurrency: int = 1

    @property
    def decoded_by(self) -> str:
        """The engine with its version, and the load where there was one: ``llama.cpp
        b6123, 4 requests at a time``."""
        version = self.versions.get(self.engine)
        told = f"{self.engine} {version}" if version else self.engine
        if self.concurrency == 1:
            return told
        return f"{told}, {self.concurrency} requests at a time"

    def key(self) -> tuple[str | int | None, ...]:
        """Everything that decides speed; versions need not match."""
        return (*self.place(), self.heads)

    def place(self) -> tuple[str | int | None, ...]:
        """The same without trained heads: what the cost of a forward depends on."""
        return tuple(getattr(self, name) for name in (*HOLDS, *TOLD, "draft"))

    def differences(self, other: Environment, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that are known of both and differ."""
        unknown = ("configuration", "kernel", "attention")
        return [
            name
            for name in names
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
            and not (name in unknown and None in (mine, theirs))
        ]


# Another one of these, and what was measured says nothing.
HOLDS = (
    *("model", "configuration", "dtype", "device", "device_name"),
    *("kernel", "attention"),
    *("engine", "concurrency"),
)
# These change every setting's speed alike, so ratios still serve; it is told.
TOLD = ("threads",)


@dataclass(frozen=True)
class Measurement:
    """Speed of one setting on one class's held-out prompts.

    Args:
        tokens_per_second: Median over prompts of decoding speed (prefill excluded).
        tokens_per_second_low: First quartile over prompts.
        tokens_per_second_high: Third quartile over prompts.
        ratio: How much better than plain decoding in the objective: geometric mean
            over prompts, paired.
        ratio_low: First quartile over prompts of that ratio.
        ratio_high: Third quartile over prompts of that ratio.
        tokens_per_forward: Mean tokens committed per target forward; 0 where the engine
            doesn't tell its forwards.
        acceptance: Accepted / proposed tokens, 0 where nothing was proposed.
        prompts: How many prompts were measured.
        tokens: How many tokens were generated.
        identical: On how many prompts the output equalled plain decoding's.
        near_ties: Differences explained by a tie within the dtype's rounding.
        seconds_target: Time in the target's forwards.
        seconds_draft: Time in drafting.
        seconds_rest: Everything else.
        interval_low: Lower end of the 95% interval of ``ratio``, a t interval of
            logarithms; None where it isn't known (one prompt, or an older version's).
        interval_high: Upper end.
        latency_p95: Milliseconds per token that 95% of a generation's tokens took at
            most, a step's time shared by its tokens: median over prompts; None if not
            measured.
        peak_memory: Bytes at the highest, the model's weights included; None if not
            measured.
        objective: ``answer`` (seconds of an answer, from the prompt to its last token),
            ``speed`` (tokens per second) or ``latency`` (``latency_p95``, less is
            better): what ``ratio`` and its interval are about.
        seconds_to_first: Until the first token: the drafter's start and the prefill,
            with what the drafter does with it; median over prompts; None if not
            measured.
        controls: Generation controls (JSON) it was measured under, greedily if empty:
            name -> value.
    """

    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    tokens_per_forward: float
    acceptance: float
    prompts: int
    tokens: int
    identical: int
    near_ties: int
    seconds_target: float
    seconds_draft: float
    seconds_rest: float
    interval_low: float | None = None
    interval_high: float | None = None
    latency_p95: float | None = None
    peak_memory: int | None = None
    objective: str = SPEED
    seconds_to_first: float | None = None
    controls: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sampled(self) -> bool:
        """Whether tokens were drawn; outputs then differ without being wrong."""
        return bool(self.controls.get("temperature"))

    @property
    def measured_how(self) -> str:
        """Under which controls, in words: ``measured greedily``."""
        controls = dict(self.controls)
        temperature = controls.pop("temperature", 0)
        how = f"at temperature {temperature}" if self.sampled else "greedily"
        others = ", ".join(
            f"{name} {_short(value)}" for name, value in controls.items()
        )
        return f"measured {how}" + (f" with {others}" if others else "")


def _short(value: Any, most: int = 40) -> str:
    """A control's value, the middle of a long schema or grammar left out."""
    text = value if isinstance(value, str) else json.dumps(value)
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


@dataclass(frozen=True)
class Profile:
    """One confirmed setting of one strategy for one class of prompts.

    ``baseline`` marks another engine's result: shown, never selected.
    """

    environment: Environment
    workload: str  # digest of the prompts
    workload_name: str
    prompt_class: str
    strategy: str
    params: Mapping[str, Scalar]
    measurement: Measurement
    created: datetime  # aware, UTC
    lossless: bool = True
    baseline: bool = False
    run: str = ""  # identifier of the tuning run
    id: int | None = None  # set by the store


@dataclass(frozen=True)
class Pick:
    """A setting that may be decoded with, and why.

    Args:
        ratio: How many times as fast as plain decoding, corrected for luck.
        low: Lower end of the 95% interval.
        high: Upper end.
        needs_draft: Whether it runs with the draft model it was measured with only.
        needs_heads: The same of trained heads.
        lossless: False where sampled output follows another distribution than the
            target's: used only where that is allowed.
    """

    strategy: str
    params: Mapping[str, Scalar]
    reason: str
    ratio: float
    low: float
    high: float
    needs_draft: bool = False
    needs_heads: bool = False
    lossless: bool = True


@dataclass(frozen=True)
class ClassChoice:
    """What a tune decided for a class, or for ``EVERY_CLASS``.

    Args:
        picks: Settings that are reliably faster than plain decoding, the best first;
            the first that can be used is. Plain decoding where there is none.
        reason: Why plain decoding, where none is used.
        prompts: On how many it rests.
        tried: Strategies that the tune tried.
        objective: What ratios are about, as of :class:`Measurement`.
        pinned: Whether a person has pinned its run: it counts before all others.
    """

    environment: Environment
    run: str
    prompt_class: str
    created: datetime  # aware, UTC
    picks: Sequence[Pick]
    reason: str
    prompts: int
    tried: Sequence[str] = ()
    objective: str = SPEED
    pinned: bool = False


@dataclass(frozen=True)
class Trial:
    """One finished trial of a tuning run, so that an interrupted run continues."""

    run: str
    prompt_class: str
    strategy: str
    number: int
    params: Mapping[str, Scalar]
    state: str  # complete | pruned | failed
    value: float | None  # tokens per second, median over the tuning prompts
    detail: Mapping[str, Any] = field(default_factory=dict)


# Sums of a use that fade.
FADING = ("log_ratio", "log_ratio_squared", "weight")


@dataclass(frozen=True)
class Use:
    """Sums over the requests that were decoded with a profile's setting; no text.

    Args:
        profile: Its id in the store.
        prompt_class: The class that was chosen for, ``*`` for the choice over all.
        requests: How many; those without a decoding step aren't counted.
        tokens: Generated after each request's first token.
        forwards: The target's forwards after the prefill.
        proposed: Candidates verified.
        accepted: Candidates accepted.
        seconds_prefill: Reading the prompts.
        seconds: Decoding after the prefill.
        log_ratio: Sum of the logarithms of how many times as fast as plain decoding a
            request was, in what the choice's objective compares. This sum and the next
            two are weighed, and fade with every request of the class.
        log_ratio_squared: Sum of their squares.
        weight: Sum of the weights; 0: nothing is known of the ratio.
        kept: What of these three sums stays where this is added to earlier ones.
    """

    profile: int
    prompt_class: str
    requests: int
    tokens: int
    forwards: int
    proposed: int
    accepted: int
    seconds_prefill: float
    seconds: float
    log_ratio: float = 0.0
    log_ratio_squared: float = 0.0
    weight: float = 0.0
    kept: float = 1.0

    def __add__(self, later: Use) -> Use:
        """The sums of both; they must be of one profile and class."""
        kept = later.kept
        return Use(
            self.profile,
            self.prompt_class,
            self.requests + later.requests,
            self.tokens + later.tokens,
            self.forwards + later.forwards,
            self.proposed + later.proposed,
            self.accepted + later.accepted,
            self.seconds_prefill + later.seconds_prefill,
            self.seconds + later.seconds,
            self.log_ratio * kept + later.log_ratio,
            self.log_ratio_squared * kept + later.log_ratio_squared,
            self.weight * kept + later.weight,
            self.kept * kept,
        )

    def faded(self, kept: float) -> Use:
        """The same with a share of what is known of the ratio."""
        return Use(
            self.profile,
            self.prompt_class,
            self.requests,
            self.tokens,
            self.forwards,
            self.proposed,
            self.accepted,
            self.seconds_prefill,
            self.seconds,
            self.log_ratio * kept,
            self.log_ratio_squared * kept,
            self.weight * kept,
            self.kept * kept,
        )

    @property
    def ratio(self) -> float | None:
        """How many times as fast as plain decoding requests lately were: weighed
        geometric mean; None where it isn't known."""
        if self.weight <= 0:
            return None
        return math.exp(self.log_ratio / self.weight)

    @property
    def tokens_per_forward(self) -> float:
        """Mean tokens committed per target forward; 1 is plain decoding."""
        return self.tokens / self.forwards if self.forwards else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, prefill excluded."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def acceptance(self) -> float:
        """Accepted / proposed candidates, 0 where nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0


class ProfileStore(Protocol):
    """Keeps profiles, choices and trials. Every write is one transaction.

    Several processes may use one store. All times are aware and in UTC.
    """

    @property
    def url(self) -> str:
        """The database's address, without secrets."""

    @property
    def folder(self) -> Path | None:
        """The folder for files that belong to the store; None if it keeps nothing."""

    def add_profiles(self, profiles: Sequence[Profile]) -> list[int]:
        """Store ``profiles`` at once; return their ids.

        One of the same run, class, setting and baseline flag is replaced and keeps its
        id. An older one of the strategy, which was measured again with other
        parameters, is forgotten. An id never comes to mean another setting.
        """

    def profiles(
        self,
        *,
        model: str | None = None,
        prompt_class: str | None = None,
        run: str | None = None,
    ) -> list[Profile]:
        """Matching profiles, newest first."""

    def profile(self, profile_id: int) -> Profile | None:
        """One profile by id."""

    def delete_run(self, run: str) -> int:
        """Forget all of a run; return how many profiles it had."""

    def put_choices(self, choices: Sequence[ClassChoice]) -> None:
        """Store choices at once, replacing those of the same run and class; whether a
        run is pinned stays."""

    def choices(
        self, *, model: str | None = None, run: str | None = None
    ) -> list[ClassChoice]:
        """Matching choices, newest first."""

    def pin(self, run: str, pinned: bool) -> int:
        """Pin or unpin a run; return how many choices it has."""

    def add_trial(self, trial: Trial) -> None:
        """Store a finished trial; one run, class, strategy and number once only."""

    def trials(self, run: str) -> list[Trial]:
        """A run's finished trials by class, strategy and number."""

    def put_record(self, run: str, key: str, value: Mapping[str, Any]) -> None:
        """Keep a run's JSON record under ``key``, replacing an older one."""

    def record(self, run: str, key: str) -> dict[str, Any] | None:
        """A run's JSON record."""

    def add_uses(self, uses: Sequence[Use]) -> None:
        """Add to the sums of the same profile and class, all at once, as ``+`` does.

        Those of profiles that aren't there any more are left out, and so are those of
        no request where there is nothing to fade. A profile measured
        again begins anew, and a deleted run's are forgotten.
        """

    def uses(self) -> list[Use]:
        """All sums, by profile and class."""

    def close(self) -> None:
        """Release connections."""
