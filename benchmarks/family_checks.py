"""Compares every strategy's output on one model with the model's own ``generate``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import (
    Context,
    Drafter,
    Outcome,
    SamplingDistribution,
    Strategy,
    Target,
    TokenTree,
)
from adaptspec.testing.fakes import noisy_draft
from adaptspec.testing.heads import attach_tiny_heads
from adaptspec.token_tree import Drawn

NEW_TOKENS = 12
SAMPLED_CONTROLS = Controls(max_new_tokens=NEW_TOKENS, temperature=0.8, seed=1)
SAMPLED = (1, 3)  # which of them are sampled after
EXACT = (torch.float32, torch.float64)
# Logits differ by rounding: relative to their spread, in float32.
DISTRIBUTION_TOLERANCE = 1e-3
SAMPLER_TOLERANCE = 1e-5
# In half precision, in units of the type's precision times the logits' spread; what
# rounding really does is measured, and this is the most that is believed of it.
MOST_ROUNDING = 24.0
WEIGHT_CHANGES = 12


@dataclass
class Report:
    """What one model in one type came to.

    Args:
        level: ``trees``, ``chains``, ``plain``, ``plain, no cache``; or ``refused``,
            ``not built``, ``not comparable`` (transformers' own ``generate`` raises),
            ``crashed``.
        reason: Why it isn't trees.
        compared: Outputs compared with ``generate``.
        equal: Those that are the same, token for token.
        ties: Those that differ where two tokens are as likely but for rounding.
        wrong: What is wrong, by strategy.
        skipped: Why strategies can't run, by strategy.
        accepted: Drafted tokens that were accepted, of all strategies.
        varied: Most different tokens in one reference.
        distribution_error: Largest relative error of a probability along equal outputs.
    """

    level: str = ""
    reason: str = ""
    compared: int = 0
    equal: int = 0
    ties: int = 0
    wrong: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    accepted: int = 0
    varied: int = 0
    distribution_error: float = 0.0

    def blame(self, strategy: str, what: str) -> None:
        """Something is wrong with ``strategy``."""
        self.wrong.setdefault(strategy, []).append(what)


class Reference:
    """The model's own ``generate``, and the logits it would have shown for any output.

    A copy decodes each time: a rotary table that grew would change the next text.

    Args:
        module: Left as it is, but for its ``generation_config``.
    """

    def __init__(self, module: Any) -> None:
        # Whatever a family's defaults are: only the most likely token counts here.
        module.generation_config = GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
        self._module = module
        self.dtype: torch.dtype = next(module.parameters()).dtype
        self._precise: Any = None
        self.greedy = functools.cache(self._greedy)
        self.logits = functools.cache(self._logits)
        self.noise = functools.cache(self._noise)
        self.shaken = functools.cache(self._shaken)

    def _greedy(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        output = self._generate(copy.deepcopy(self._module), ids, NEW_TOKENS)
        return tuple(output.sequences[0, len(ids) :].tolist())

    def _logits(self, ids: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
        """Logits ``[tokens, vocab]`` before each of ``tokens``, float32."""
        return self._forced(copy.deepcopy(self._module), ids, tokens)

    def _noise(self, ids: tuple[int, ...], tokens: tuple[int, ...]) -> float:
        """How far rounding moves two logits of this output against each other."""
        here = self.logits(ids, tokens)
        unit = torch.finfo(self.dtype).eps * float(here.max() - here.min())
        try:
            there = self._forced(copy.deepcopy(self._wide()), ids, tokens)
            moved = 2 * float((here - there).abs().max())
        except Exception:  # some code can't run in another type
            moved = 4 * unit
        return min(max(moved, 2 * unit), MOST_ROUNDING * unit)

    def _shaken(self, ids: tuple[int, ...], tokens: tuple[int, ...]) -> float:
        """The same where rounding decides on an expert or a key, or is amplified.

        Weights are moved by a unit of precision, at random, in the next wider type.
        """
        try:
            there = self._forced(copy.deepcopy(self._wide()), ids, tokens)
            unit, moved = torch.finfo(self.dtype).eps, 0.0
            for seed in range(WEIGHT_CHANGES):
                module = copy.deepcopy(self._wide())
                generator = torch.Generator().manual_seed(seed)
                for parameter in module.parameters():
                    drawn = torch.rand(parameter.shape, generator=generator)
                    parameter.data *= 1 + unit * (2 * drawn.to(parameter) - 1)
                here = self._forced(module, ids, tokens)
                moved = max(moved, 2 * float((here - there).abs().max()))
        except Exception:  # as above
            return 0.0
        return moved

    def _wide(self) -> Any:
        if self._precise is None:
            wide = torch.float64 if self.dtype == torch.float32 else torch.float32
            self._precise = copy.deepcopy(self._module).to(wide)
        return self._precise

    def explains(
        self, ids: tuple[int, ...], tokens: tuple[int, ...], moved: float
    ) -> bool:
        """Whether rounding can move a logit of this output so far."""
        if moved <= self.noise(ids, tokens):
            return True
        return moved <= self.shaken(ids, tokens)

    def _forced(
        self, module: Any, ids: tuple[int, ...], tokens: tuple[int, ...]
    ) -> torch.Tensor:
        output = self._generate(module, ids, len(tokens), _Force(len(ids), tokens))
        assert tuple(output.sequences[0, len(ids) :].tolist()) == tokens
        return torch.cat([step.float() for step in output.logits])

    def _generate(
        self, module: Any, ids: tuple[int, ...], count: int, *force: LogitsProcessor
    ) -> Any:
        return module.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList(force),
            return_dict_in_generate=True,
            output_logits=True,
        )


class _Force(LogitsProcessor):
    """Makes ``generate`` emit the given tokens."""

    def __init__(self, prompt: int, tokens: Sequence[int]) -> None:
        self._prompt, self._tokens = prompt, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self._tokens[input_ids.shape[1] - self._prompt]] = 0
        return forced


@dataclass
class Seen:
    """What a drafter was shown: the logits before each emitted token."""

    logits: list[torch.Tensor] = field(default_factory=list)
    drawn: set[Drawn] = field(default_factory=set)
    sampling: SamplingDistribution | None = None


class _Witness(Drafter):
    """Passes everything on, and writes down what the target showed."""

    def __init__(self, inner: Drafter, seen: Seen, prompt: int) -> None:
        self._inner, self._seen, self._prompt = inner, seen, prompt

    def propose(self, context: Context) -> TokenTree:
        tree = self._inner.propose(context)
        if len(tree) > 1:
            self._seen.drawn.add(tree.drawn)
        return tree

    def observe(self, outcome: Outcome) -> None:
        nodes = [self._prompt - 1] if outcome.tree is None else outcome.path
        for node, _ in zip(nodes, outcome.emitted, strict=True):
            self._seen.logits.append(outcome.logits[outcome.rows[node]].float().clone())
        self._inner.observe(outcome)

    def close(self) -> None:
        self._inner.close()


def witnessed(host: Host, name: str, seen: Seen) -> Strategy:
    """A strategy of ``host`` that drafts at every step, and what it was shown."""
    cls = host.strategy(name)

    def start(self: Any, target: Target) -> Drafter:
        seen.sampling = target.sampling
        return _Witness(cls.start(self, target), seen, len(target.prompt))

    made: type[Strategy] = type(cls.__name__, (cls,), {"start": start})
    strategy = made(cls.Params())
    strategy.meet(host.strategies)
    return strategy


def check(
    module: Any,
    host: Host,
    prompts: Sequence[tuple[int, ...]],
    strategies: Sequence[str] | None = None,
) -> Report:
    """Decode after ``prompts`` with every strategy and compare with ``generate``."""
    report = Report()
    reference = Reference(module)
    try:
        with torch.inference_mode():
            for ids in prompts:
                said = reference.greedy(ids)
                report.varied = max(report.varied, len(set(said)))
                if not reference.logits(ids, said).isfinite().all():
                    raise ValueError("the model's logits aren't finite")
    except Exception as error:
        report.level, report.reason = "not comparable", f"generate: {_line(error)}"
        return report
    try:
        model = LanguageModel(module)
        capability = model.capability
    except AdaptSpecError as error:
        report.level, report.reason = "refused", _line(error)
        return report
    except Exception as error:
        report.level, report.reason = "crashed", _line(error)
        report.blame("loading", _line(error))
        return report
    report.level = {"tree": "trees", "chain": "chains"}.get(
        capability.level, capability.level
    )
    if capability.uncached:
        report.level = "plain, no cache"
    report.reason = capability.reason
    draft = noisy_draft(model)
    plain = functools.cache(functools.partial(_plain, model, host))
    for name in sorted(strategies or host.strategies):
        _check_strategy(report, reference, model, draft, host, name, prompts, plain)
    if reason := report.skipped.get("autoregressive"):
        report.level, report.reason = "refused", reason
    return report


def _check_strategy(
    report: Report,
    reference: Reference,
    model: LanguageModel,
    draft: LanguageModel,
    host: Host,
    name: str,
    prompts: Sequence[tuple[int, ...]],
    plain: Callable[[tuple[int, ...]], list[int]],
) -> None:
    cls = host.strategy(name)
    if cls.requires.draft == "another tokenizer":
        report.skipped[name] = "needs tokenizers"
        return
    try:
        if cls.requires.heads is not None:
            model = copy.copy(model)
            model.heads = {}
            attach_tiny_heads(model)
        if reason := cls.unavailable(model, draft):
            report.skipped[name] = reason
            return
        for ids, greedy in _turns(prompts):
            if not greedy and not cls.lossless:
                continue
            controls = Controls.greedy(NEW_TOKENS) if greedy else SAMPLED_CONTROLS
            seen = Seen()
            strategy = witnessed(host, name, seen)
            run = Engine(model, draft, guard=False).generate(strategy, ids, controls)
            report.accepted += run.stats.accepted
            tokens = tuple(run.token_ids)
            if greedy:
                verdict = _judge_greedy(report, reference, ids, tokens, seen)
            else:
                verdict = _judge_sampled(
                    report, reference, ids, tokens, seen, plain(ids)
                )
            report.compared += 1
            if verdict == "equal":
                report.equal += 1
            elif verdict == "tie":
                report.ties += 1
            else:
                kind = "greedy" if greedy else "sampled"
                report.blame(name, f"{kind} after {len(ids)}: {verdict}")
    except AdaptSpecError as error:
        report.skipped[name] = _line(error)
    except Exception as error:
        report.blame(name, f"raised {_line(error)}")


def _plain(model: LanguageModel, host: Host, ids: tuple[int, ...]) -> list[int]:
    """What plain sampling emits."""
    strategy = witnessed(host, "autoregressive", Seen())
    return (
        Engine(model, guard=False).generate(strategy, ids, SAMPLED_CONTROLS).token_ids
    )


def _turns(
    prompts: Sequence[tuple[int, ...]],
) -> Iterator[tuple[tuple[int, ...], bool]]:
    for ids in prompts:
        yield ids, True
    for place in SAMPLED:
        if place < len(prompts):
            yield prompts[place], False


def _judge_greedy(
    report: Report,
    reference: Reference,
    ids: tuple[int, ...],
    tokens: tuple[int, ...],
    seen: Seen,
) -> str:
    expected = reference.greedy(ids)
    if len(tokens) != len(expected):
        return f"{len(tokens)} tokens in place of {len(expected)}"
    logits = reference.logits(ids, tokens)
    problem = _distribution_problem(report, reference, ids, tokens, seen)
    if tokens == expected:
        return problem or "equal"
    for place, token in enumerate(tokens):
        behind = float(logits[place].max() - logits[place, token])
        if not reference.explains(ids, tokens, behind):
            noise = reference.noise(ids, tokens)
            return f"token {place} is {behind:.2g} behind (rounding {noise:.2g})"
    return problem or "tie"


def _judge_sampled(
    report: Report,
    reference: Reference,
    ids: tuple[int, ...],
    tokens: tuple[int, ...],
    seen: Seen,
    plain: Sequence[int],
) -> str:
    if len(tokens) != len(plain):
        return f"{len(tokens)} tokens in place of {len(plain)}"
    if problem := _distribution_problem(report, reference, ids, tokens, seen):
        return problem
    assert seen.sampling is not None
    for place, logits in enumerate(seen.logits):
        probs = seen.sampling.probs([*ids, *tokens[:place]], logits)
        expected = (logits / SAMPLED_CONTROLS.temperature).softmax(-1)
        if (error := float((probs - expected).abs().sum()) / 2) > SAMPLER_TOLERANCE:
            return f"token {place}'s distribution is {error:.2g} off (total variation)"
    if list(tokens) == list(plain):
        return "equal"
    if seen.drawn - {Drawn.DETERMINISTIC}:
        return "equal"  # in distribution: the draft's noise is its own
    place = next(i for i, token in enumerate(tokens) if token != plain[i])
    noise = reference.noise(ids, tokens)
    logits = seen.logits[place].clone()
    logits[plain[place]] += 2 * noise
    bent = (logits / SAMPLED_CONTROLS.temperature).softmax(-1)
    if seen.sampling.coupled(bent, len(ids) + place) == plain[place]:
        return "tie"
    return f"token {place} isn't plain sampling's"


def _distribution_problem(
    report: Report,
    reference: Reference,
    ids: tuple[int, ...],
    tokens: tuple[int, ...],
    seen: Seen,
) -> str:
    """Where the logits that decided aren't those of ``generate``, or nothing."""
    expected = reference.logits(ids, tokens)
    found = torch.stack(seen.logits)
    spread = float(expected.max() - expected.min())
    errors = (found - expected).abs().amax(1) / spread
    worst = int(errors.nan_to_num(torch.inf).argmax())
    error = float(errors[worst])
    report.distribution_error = max(report.distribution_error, error)
    if reference.dtype in EXACT and error <= DISTRIBUTION_TOLERANCE:
        return ""
    if reference.explains(ids, tokens, error * spread / 2):
        return ""
    return f"logits before token {worst} are {error:.2g} of their spread off"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
