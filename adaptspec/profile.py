"""Value types of what was measured, and the store that keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from adaptspec.params import Scalar

PLAIN = "autoregressive"
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
        threads: Intra-op threads.
        versions: Package -> version (adaptspec, torch, transformers, python).
        heads: Digest of the trained heads attached to the target, None without any.
        heads_name: Their names for people.
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

    def key(self) -> tuple[str, str | None, str, str, str, int, str | None]:
        """Fields that must match for a profile to apply; versions need not match."""
        return (*self.place(), self.heads)

    def place(self) -> tuple[str, str | None, str, str, str, int]:
        """The same without trained heads: what the cost of a forward depends on."""
        return (
            self.model,
            self.draft,
            self.dtype,
            self.device,
            self.device_name,
            self.threads,
        )


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
        tokens_per_forward: Mean tokens committed per target forward.
        acceptance: Accepted / proposed tokens, 0 where nothing was proposed.
        prompts: How many prompts were measured.
        tokens: How many tokens were generated.
        identical: On how many prompts the output equalled plain decoding's.
        near_ties: Differences explained by a tie within the dtype's rounding.
        seconds_target: Time in the target's forwards.
        seconds_draft: Time in drafting.
        seconds_rest: Everything else.
        interval_low: Lower end of the 95% bootstrap interval of ``ratio``; None where
            it isn't known (one prompt, or an older version's measurement).
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
        controls: Generation controls that it was measured under, greedily if empty:
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
    controls: Mapping[str, Scalar | None] = field(default_factory=dict)

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
        others = ", ".join(f"{name} {value}" for name, value in controls.items())
        return f"measured {how}" + (f" with {others}" if others else "")


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


class ProfileStore(Protocol):
    """Keeps profiles and trials. Every write is one transaction.

    Several processes may use one store. All times are aware and in UTC.
    """

    @property
    def url(self) -> str:
        """The database's address, without secrets."""

    @property
    def folder(self) -> Path | None:
        """The folder for files that belong to the store; None if it keeps nothing."""

    def add_profiles(self, profiles: Sequence[Profile]) -> list[int]:
        """Store ``profiles`` at once, replacing those of the same run, class, strategy
        and baseline flag, which keep their ids; return the ids."""

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
        """Forget a run's profiles and trials; return how many profiles it had."""

    def add_trial(self, trial: Trial) -> None:
        """Store a finished trial; one run, class, strategy and number once only."""

    def trials(self, run: str) -> list[Trial]:
        """A run's finished trials by class, strategy and number."""

    def put_record(self, run: str, key: str, value: Mapping[str, Any]) -> None:
        """Keep a run's JSON record under ``key``, replacing an older one."""

    def record(self, run: str, key: str) -> dict[str, Any] | None:
        """A run's JSON record."""

    def close(self) -> None:
        """Release connections."""
