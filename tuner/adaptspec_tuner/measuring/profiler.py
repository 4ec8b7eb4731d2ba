"""Measures one setting on one prompt, and compares its output with plain decoding's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from adaptspec.errors import AdaptSpecError
from adaptspec.heads.protocol import bytes_of
from adaptspec.params import Scalar
from adaptspec.profile import ANSWER, LATENCY, PLAIN
from adaptspec_tuner.measuring.in_turns import Generating
from adaptspec_tuner.measuring.peak_memory import PeakMemory, weights_of
from adaptspec_tuner.measuring.whole import Whole, generation_of_baseline

if TYPE_CHECKING:
    import torch

    from adaptspec.decoding.controls import Controls
    from adaptspec.decoding.engine import Engine, Generation
    from adaptspec.host import Host
    from adaptspec.model.language_model import LanguageModel
    from adaptspec.strategy import Strategy
    from adaptspec.workloads import Prompt
    from adaptspec_tuner.records import RunRecords

# Sampled outputs that differ aren't compared.
Agreement = Literal["identical", "near_tie", "mismatch", "not_compared"]

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Setting:
    """A strategy (or baseline) with its parameters."""

    strategy: str
    params: Mapping[str, Scalar] = field(default_factory=dict)
    baseline: bool = False

    @property
    def key(self) -> str:
        """Equal for equal settings."""
        return json.dumps([self.strategy, dict(self.params)], sort_keys=True)

    @classmethod
    def from_key(cls, key: str) -> Setting:
        """The setting (not a baseline's) that has this key."""
        strategy, params = json.loads(key)
        return cls(strategy, params)


PLAIN_SETTING = Setting(PLAIN)


@dataclass(frozen=True)
class Sample:
    """One generation: decoding speed (prefill excluded) and what it took.

    Args:
        seconds: Of the whole answer, from the prompt to its last token.
        seconds_to_first: Of these, until the first token; 0 where it isn't known.
        speed: Tokens per second after the first; 0 if there was only one.
        latency_p95: Milliseconds per token, see ``RunStats``; 0 if not measured.
        positions: By depth from 1: steps that accepted a candidate, that had one.
        peak_memory: Bytes, 0 if not measured.
    """

    tokens: tuple[int, ...]
    speed: float
    seconds: float
    forwards: int = 0
    proposed: int = 0
    accepted: int = 0
    seconds_target: float = 0.0
    seconds_draft: float = 0.0
    seconds_rest: float = 0.0
    latency_p95: float = 0.0
    positions: tuple[tuple[int, int], ...] = ()
    peak_memory: int = 0
    seconds_to_first: float = 0.0

    def gain(self, plain: Sample, objective: str = ANSWER) -> float:
        """How much better than ``plain`` in the objective: above 1 is better."""
        if objective == LATENCY:
            if not (self.latency_p95 and plain.latency_p95):
                return 0.0
            return plain.latency_p95 / self.latency_p95
        if objective == ANSWER:
            seconds = self.seconds_of(len(plain.tokens))
            return plain.seconds / seconds if seconds > 0 else 0.0
        return self.speed / plain.speed if plain.speed else 0.0

    def seconds_of(self, tokens: int) -> float:
        """Of an answer of so many tokens, the later ones as fast as here."""
        if len(self.tokens) == tokens or not self.speed:
            return self.seconds
        return self.seconds_to_first + (tokens - 1) / self.speed

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return {**asdict(self), "tokens": list(self.tokens)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Sample:
        """The sample a record holds."""
        return replace(
            cls(**record),
            tokens=tuple(record["tokens"]),
            positions=tuple(
                (accepted, offered) for accepted, offered in record.get("positions", ())
            ),
        )


@dataclass(frozen=True)
class Recording:
    """Plain greedy decoding of one prompt.

    Args:
        prompt: Token ids.
        tokens: What was generated.
        most: How many tokens might have been.
        forwards: Of the target, the prefill not counted; 0 where nothing was timed.
        seconds_target: What these took.
        seconds_rest: What its steps took beside them.
        seconds_to_first: Until its first token.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    most: int
    forwards: int = 0
    seconds_target: float = 0.0
    seconds_rest: float = 0.0
    seconds_to_first: float = 0.0


class Measurer(Protocol):
    """Runs settings on prompts; the search sees only this."""

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        """One generation."""

    def agreement(
        self, prompt: Prompt, plain: Sequence[int], other: Sequence[int]
    ) -> Agreement:
        """How ``other`` compares with plain decoding's tokens."""

    def forget(self) -> None:
        """Drop what strategies have learnt from earlier prompts."""


@runtime_checkable
class TurnMeasurer(Measurer, Protocol):
    """Also begins generations that take turns; the confirmation sees only this."""

    @property
    def controls(self) -> Mapping[str, Scalar | None]:
        """Generation controls that are measured under, greedily if empty."""

    @property
    def greedy(self) -> bool:
        """Whether outputs must be plain decoding's."""

    def warm_up(self, setting: Setting, prompts: Sequence[Prompt]) -> int:
        """Decode a few tokens alone, and forget them.

        Returns:
            The most bytes that any of the prompts takes, 0 where that isn't known.
        """

    def fits(self, settings: Sequence[Setting], prompt: Prompt) -> bool:
        """Whether there is memory for a generation of each at the same time."""

    def begin(
        self,
        setting: Setting,
        prompt: Prompt,
        follow: Callable[[int, int], int] | None = None,
        repeat: int = 0,
    ) -> Generating:
        """A generation to iterate over; see ``decoding.engine.Run`` for ``follow``."""


@runtime_checkable
class MeasuresAhead(Protocol):
    """A measurer of settings that take time to be ready, and can't all be at once."""

    keeps: bool
    """Whether a setting is measured but once on a prompt, whoever asks how often."""

    @property
    def starting(self) -> float:
        """Seconds that a new setting takes to be ready, as far as is known."""

    @property
    def beside_plain(self) -> int:
        """How many settings are measured beside the same plain answers."""

    def starts_for(self, settings: int) -> int:
        """How many starts as many settings take, those of plain decoding included."""

    def measure_ahead(
        self,
        asked: Sequence[tuple[Setting, Sequence[Prompt]]],
        in_time: Callable[[], bool] = ...,
        records: RunRecords | None = None,
    ) -> list[Setting] | None:
        """Told which settings are measured next, on which prompts.

        Args:
            in_time: Whether another setting may begin; the first does anyway.
            records: Where answers are kept for a run that is continued.

        Returns:
            Those that were measured now, so that they take no more time; the others
            mustn't be asked. None where none was, and each is measured when asked.
        """

    def ready_first(self, settings: Sequence[Setting]) -> list[Setting]:
        """The same settings, in the order in which they take the least time."""


class Profiler:
    """Measures on a real model.

    Args:
        engine: Runs the strategies.
        host: Where strategies and baselines are found.
        max_new_tokens: For prompts that don't say.
        theirs: What baselines run on; default: the engine's target.
        their_draft: The same for its draft.
        max_memory: Bytes; a setting that takes more is refused.
        controls: Of generation: arguments of ``Controls.for_model``. Greedy if empty.
        seed: Of sampling, in the first repeat.

    Raises:
        UnsupportedControlError: naming a control that can't be honoured.
    """

    def __init__(
        self,
        engine: Engine,
        host: Host,
        max_new_tokens: int,
        theirs: LanguageModel | None = None,
        their_draft: LanguageModel | None = None,
        max_memory: int | None = None,
        controls: Mapping[str, Scalar | None] | None = None,
        seed: int = 0,
    ) -> None:
        self._engine, self._host = engine, host
        self._peak = PeakMemory(engine.model.device)
        self._max_memory = max_memory
        self._theirs = theirs or engine.model
        self._their_draft = their_draft or engine.draft
        self._max_new_tokens = max_new_tokens
        self._strategies: dict[str, Strategy] = {}
        self._warm: set[str] = set()
        self._ids: dict[str, list[int]] = {}
        self._chosen, self._seed = dict(controls or {}), seed
        self._greedy = self._controls(max_new_tokens).temperature == 0

    @property
    def controls(self) -> Mapping[str, Scalar | None]:
        """Generation controls that are measured under, greedily if empty."""
        return self._chosen

    @property
    def greedy(self) -> bool:
        """Whether outputs must be plain decoding's."""
        return self._greedy

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        """One generation; a setting's first is preceded by a short warm-up.

        Raises:
            AdaptSpecError: if it took more than ``max_memory``.
        """
        ids, length = self._encoded(prompt), self._length(prompt)
        if setting.key not in self._warm:
            self._run(setting, ids, min(WARM_UP_TOKENS, length))
            self._warm.add(setting.key)
            self._strategies.pop(setting.key, None)  # what it learnt from the prompt
        self._peak.reset()
        sample = self._run(setting, ids, length)
        return replace(sample, peak_memory=self._taken(setting))

    def warm_up(self, setting: Setting, prompts: Sequence[Prompt]) -> int:
        """Decode a few tokens of the longest prompt's answer alone, and forget them.

        Returns:
            Bytes of memory at the highest, as for the whole answer; 0 if not known.

        Raises:
            AdaptSpecError: if it took more than ``max_memory``.
        """
        prompt = max(prompts, key=lambda p: len(self._encoded(p)) + self._length(p))
        self._peak.reset()
        if setting.baseline:
            short = min(WARM_UP_TOKENS, self._length(prompt))
            self._run(setting, self._encoded(prompt), short)
        else:
            steps = iter(self.begin(setting, prompt))
            for _ in itertools.islice(steps, WARM_UP_TOKENS):
                pass
            steps.close()
        self._warm.add(setting.key)
        self._strategies.pop(setting.key, None)  # what it learnt from the prompt
        return self._taken(setting)

    def fits(self, settings: Sequence[Setting], prompt: Prompt) -> bool:
        """Whether there is memory for the caches of all ``settings`` at once."""
        from adaptspec_tuner.measuring.cache_memory import bytes_of_row, free_bytes

        model, draft = self._engine.model, self._engine.draft
        ours = [setting for setting in settings if not setting.baseline]
        if model.capability.level == "plain" or len(ours) < 2:
            return True
        rows = len(self._encoded(prompt)) + self._length(prompt)
        needed = len(ours) * rows * bytes_of_row(model)
        if draft is not None and draft.capability.level != "plain":
            asking = sum(self._strategy(s).uses_draft(model, draft) for s in ours)
            needed += asking * rows * bytes_of_row(draft)
        return needed < free_bytes(model.device)

    def begin(
        self,
        setting: Setting,
        prompt: Prompt,
        follow: Callable[[int, int], int] | None = None,
        repeat: int = 0,
    ) -> Generating:
        """A generation to iterate over; another engine's has one step.

        Args:
            follow: See :class:`adaptspec.decoding.engine.Run`.
            repeat: Each samples with a seed of its own.
        """
        from adaptspec.decoding.engine import Run

        ids, length = self._encoded(prompt), self._length(prompt)
        if setting.baseline:
            return Whole(lambda: self._baseline(setting, ids, length))
        controls = self._controls(length, repeat)
        return Run(self._engine, self._strategy(setting), ids, controls, follow)

    def _taken(self, setting: Setting) -> int:
        """Bytes at the peak that ``setting`` needs; 0 if not known."""
        if not (taken := self._peak.bytes()):
            return 0
        taken -= self._unused(setting)
        if self._max_memory is not None and taken > self._max_memory:
            raise AdaptSpecError(
                f"{setting.strategy} takes {taken / 2**30:.2f} GiB of memory, "
                f"--max-memory is {self._max_memory / 2**30:.2f} GiB"
            )
        return taken

    def agreement(
        self, prompt: Prompt, plain: Sequence[int], other: Sequence[int]
    ) -> Agreement:
        """A difference is a near tie if a fresh forward calls it one."""
        if list(plain) == list(other):
            return "identical"
        if not self._greedy:
            return "not_compared"
        at = first_difference(plain, other)
        if at is None:
            return "mismatch"
        ids = [*self._encoded(prompt), *plain[:at]]
        from adaptspec.decoding.near_ties import near_tie

        logits = self._logits(prompt, ids)
        tied = near_tie(logits, plain[at], other[at], self._engine.model.dtype)
        return "near_tie" if tied else "mismatch"

    def forget(self) -> None:
        """New strategy objects from here on."""
        self._strategies.clear()

    def recording(self, prompt: Prompt, plain: Sample) -> Recording:
        """Plain decoding with the prompt that it answers."""
        return Recording(
            self._encoded(prompt),
            plain.tokens,
            self._length(prompt),
            plain.forwards,
            plain.seconds_target,
            plain.seconds_draft + plain.seconds_rest,
            plain.seconds_to_first,
        )

    def needs(self, setting: Setting) -> tuple[bool, bool]:
        """Whether a setting of ours runs the draft model, and whether trained heads."""
        model, draft = self._engine.model, self._engine.draft
        strategy = self._strategy(setting)
        asks = draft is not None and strategy.uses_draft(model, draft)
        return asks, bool(self._read_heads(strategy))

    def _read_heads(self, strategy: Strategy) -> set[str]:
        """Which of the attached heads a strategy may ask."""
        model = self._engine.model
        if not model.heads:
            return set()
        if (kind := strategy.requires.heads) is not None:
            return {kind}
        # Heads read hidden states; a hybrid that asks for some may use any.
        return set(model.heads) if strategy.observes(model).hidden_layers else set()

    def _unused(self, setting: Setting) -> int:
        """Bytes of loaded weights that ``setting`` would do without."""
        return self._unused_models(setting) + self._unused_heads(setting)

    def _unused_models(self, setting: Setting) -> int:
        """A draft model that isn't asked, and the models of other engines."""
        model, draft = self._engine.model, self._engine.draft
        if setting.baseline:
            baseline = self._host.baselines[setting.strategy]
            asks = baseline.requires.draft is not None
            used = [self._theirs, self._their_draft if asks else None]
        else:
            asks, _ = self.needs(setting)
            used = [model, draft if asks else None]
        loaded = [model, draft, self._theirs, self._their_draft]
        needed = weights_of(each.model for each in used if each is not None)
        everything = weights_of(each.model for each in loaded if each is not None)
        return sum(size for place, size in everything.items() if place not in needed)

    def _unused_heads(self, setting: Setting) -> int:
        model, read = self._engine.model, set[str]()
        if not setting.baseline:
            read = self._read_heads(self._strategy(setting))
        return sum(
            bytes_of(one) for kind, one in model.heads.items() if kind not in read
        )

    def _logits(self, prompt: Prompt, ids: list[int]) -> torch.Tensor:
        """Logits of the token after ``ids``, under the model's own controls."""
        from adaptspec.decoding.processing import Processors

        model = self._engine.model
        forward = model.read_alone(ids)
        raw = forward.logits[forward.rows[len(ids) - 1]]
        controls = self._controls(self._length(prompt))
        processors = Processors(controls, len(self._encoded(prompt)), model.device)
        return processors(ids, raw)

    def _run(self, setting: Setting, ids: list[int], length: int) -> Sample:
        if setting.baseline:
            return self._run_baseline(setting, ids, length)
        strategy = self._strategy(setting)
        return sample_of(self._engine.generate(strategy, ids, self._controls(length)))

    def _strategy(self, setting: Setting) -> Strategy:
        """The object of this setting, with what it has learnt."""
        if setting.key not in self._strategies:
            created = self._host.create(setting.strategy, setting.params)
            self._strategies[setting.key] = created
        return self._strategies[setting.key]

    def _run_baseline(self, setting: Setting, ids: list[int], length: int) -> Sample:
        return sample_of_whole(self._baseline(setting, ids, length))

    def _baseline(self, setting: Setting, ids: list[int], length: int) -> Generation:
        cls = self._host.baselines[setting.strategy]
        baseline = cls(cls.Params.parse(setting.params, setting.strategy))
        run = baseline.run(self._theirs, self._their_draft, ids, length)
        return generation_of_baseline(run)

    def _controls(self, length: int, repeat: int = 0) -> Controls:
        from adaptspec.decoding.controls import Controls
        from adaptspec.decoding.generation_fields import ONE_SEQUENCE

        return Controls.for_model(
            self._engine.model,
            **{
                **ONE_SEQUENCE,
                "temperature": 0.0,
                "seed": self._seed + repeat,
                **self._chosen,
                "max_new_tokens": length,
            },
        )

    @property
    def most_tokens(self) -> int | None:
        """Of a prompt and its output; None where the model doesn't say."""
        return self._engine.model.max_length

    def ids(self, prompt: Prompt) -> Sequence[int]:
        """The prompt's token ids.

        Raises:
            AdaptSpecError: if it can't be encoded; templates may raise anything else.
        """
        return self._encoded(prompt)

    def length(self, prompt: Prompt) -> int:
        """New tokens that are asked for."""
        return self._length(prompt)

    def _length(self, prompt: Prompt) -> int:
        return prompt.max_new_tokens or self._max_new_tokens

    def _encoded(self, prompt: Prompt) -> list[int]:
        if prompt.id not in self._ids:
            self._ids[prompt.id] = prompt.encode(self._engine.model)
        return self._ids[prompt.id]


def sample_of(run: Generation) -> Sample:
    """What one generation took."""
    stats = run.stats
    return Sample(
        tokens=tuple(run.token_ids),
        speed=stats.tokens_per_second,
        seconds=stats.seconds_prefill + stats.seconds_decode,
        forwards=stats.target_forwards,
        proposed=stats.proposed,
        accepted=stats.accepted,
        seconds_target=stats.seconds_target,
        seconds_draft=stats.seconds_draft,
        seconds_rest=stats.seconds_rest,
        latency_p95=stats.latency_p95,
        positions=tuple(stats.positions),
        seconds_to_first=stats.seconds_prefill,
    )


def sample_of_whole(run: Generation) -> Sample:
    """What another engine's took: it tells no latencies, and may count no forwards."""
    sample = sample_of(run)
    counted = sample.forwards if sample.forwards > 1 else 0
    return replace(sample, forwards=counted, latency_p95=0.0, positions=())


def typical(samples: Sequence[Sample]) -> Sample:
    """The first of a prompt's repeats, with the times that are typical of all."""
    return replace(
        samples[0],
        **{
            name: median(getattr(one, name) for one in samples)
            for name in (
                "seconds_target",
                "seconds_draft",
                "seconds_rest",
                "seconds_to_first",
            )
        },
    )


def in_a_line(error: BaseException) -> str:
    """An error for people; of others than AdaptSpec's with its type."""
    if isinstance(error, AdaptSpecError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first index at which both have a token and not the same one."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high
