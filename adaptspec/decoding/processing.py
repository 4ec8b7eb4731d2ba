"""Transformers' logits processors for the controls, in the order of ``generate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.generation import logits_process as hf

from adaptspec.decoding.constraint import Constraint
from adaptspec.decoding.controls import Controls
from adaptspec.errors import UnsupportedControlError
from adaptspec.token_ids import GrowingTensor

# Functions of the ids and scores they are given, and of nothing else: these classes
# themselves, since a subclass may do anything.
PURE = frozenset(
    {
        hf.EncoderNoRepeatNGramLogitsProcessor,
        hf.EncoderRepetitionPenaltyLogitsProcessor,
        hf.EpsilonLogitsWarper,
        hf.EtaLogitsWarper,
        hf.ExponentialDecayLengthPenalty,
        hf.ForcedBOSTokenLogitsProcessor,
        hf.ForcedEOSTokenLogitsProcessor,
        hf.InfNanRemoveLogitsProcessor,
        hf.LogitNormalization,
        hf.MinLengthLogitsProcessor,
        hf.MinNewTokensLengthLogitsProcessor,
        hf.MinPLogitsWarper,
        hf.NoBadWordsLogitsProcessor,
        hf.NoRepeatNGramLogitsProcessor,
        hf.RepetitionPenaltyLogitsProcessor,
        hf.SequenceBiasLogitsProcessor,
        hf.SuppressTokensAtBeginLogitsProcessor,
        hf.SuppressTokensLogitsProcessor,
        hf.TemperatureLogitsWarper,
        hf.TopHLogitsWarper,
        hf.TopKLogitsWarper,
        hf.TopPLogitsWarper,
        hf.TypicalLogitsWarper,
    }
)


# Controls that always leave the likeliest token.
WARPERS = frozenset(
    {
        "temperature",
        "top_h",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "renormalize_logits",
    }
)


class Step(NamedTuple):
    """One processor; ``name`` is the control it comes from, empty for a caller's."""

    name: str
    processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    @property
    def pure(self) -> bool:
        """Whether it is known to be a function of ids and scores."""
        return type(self.processor) in PURE or self.constrains

    @property
    def constrains(self) -> bool:
        """Whether it keeps the output in a language."""
        return isinstance(self.processor, Constraint)


class _Steps(list[Step]):
    def add(self, name: str, value: Any, build: Callable[[], Any]) -> None:
        try:
            self.append(Step(name, build()))
        except (TypeError, ValueError, RuntimeError) as error:
            text = str(error).strip().splitlines()
            raise UnsupportedControlError(
                f"{name}={value!r} can't be used: {text[0] if text else error!r}"
            ) from None


def steps_of(
    controls: Controls,
    prompt: int,
    device: torch.device,
    constraint: Constraint | None = None,
) -> list[Step]:
    """What ``GenerationMixin._get_logits_processor`` makes of the same settings.

    Args:
        prompt: Tokens of the prompt.
        constraint: Stands before a caller's own processors.

    Raises:
        UnsupportedControlError: for a value that a processor refuses.
    """
    if controls.prepared is not None:
        return [Step("", one) for one in controls.prepared.processors]
    try:
        own = _penalties(controls, prompt, device)
        if constraint is not None:
            own.append(Step("grammar", constraint))
        found = _merged(own, controls.logits_processor)
        if controls.temperature != 0:
            found += _warpers(controls, device)
    except TypeError as error:
        raise UnsupportedControlError(
            f"a control is of the wrong type: {error}"
        ) from None
    if controls.extra.get("renormalize_logits") is True:
        found.append(Step("renormalize_logits", hf.LogitNormalization()))
    return found


def _penalties(c: Controls, n: int, device: torch.device) -> _Steps:
    steps, value, on = _Steps(), c.extra.get, str(device)
    ends = list(c.eos_token_ids)
    if bias := value("sequence_bias"):
        steps.add(
            "sequence_bias", bias, lambda: hf.SequenceBiasLogitsProcessor(_pairs(bias))
        )
    if c.repetition_penalty != 1:
        penalty = float(c.repetition_penalty)
        steps.add(
            "repetition_penalty",
            penalty,
            lambda: hf.RepetitionPenaltyLogitsProcessor(penalty),
        )
    if (size := value("no_repeat_ngram_size")) is not None and size > 0:
        steps.add(
            "no_repeat_ngram_size", size, lambda: hf.NoRepeatNGramLogitsProcessor(size)
        )
    if bad := value("bad_words_ids"):
        steps.add(
            "bad_words_ids",
            bad,
            lambda: hf.NoBadWordsLogitsProcessor(bad, ends or None),
        )
    fresh = value("min_new_tokens")
    least = value("min_length") if fresh is None else n + fresh
    if least is not None and least > 0 and ends:
        steps.add(
            "min_length",
            least,
            lambda: hf.MinLengthLogitsProcessor(least, ends, device=on),
        )
    if fresh is not None and fresh > 0 and ends:
        steps.add(
            "min_new_tokens",
            fresh,
            lambda: hf.MinNewTokensLengthLogitsProcessor(n, fresh, ends, device=on),
        )
    if (first := value("forced_bos_token_id")) is not None:
        steps.add(
            "forced_bos_token_id",
            first,
            lambda: hf.ForcedBOSTokenLogitsProcessor(first),
        )
    if (last := value("forced_eos_token_id")) is not None:
        longest = n + c.room(n)
        steps.add(
            "forced_eos_token_id",
            last,
            lambda: hf.ForcedEOSTokenLogitsProcessor(longest, last, device=on),
        )
    if value("remove_invalid_values") is True:
        steps.append(Step("remove_invalid_values", hf.InfNanRemoveLogitsProcessor()))
    if (decay := value("exponential_decay_length_penalty")) is not None:
        if not isinstance(decay, list | tuple) or len(decay) != 2:
            raise UnsupportedControlError(
                "exponential_decay_length_penalty must be a pair, of how many new "
                f"tokens it begins after and of its factor, got {decay!r}; pass "
                "(50, 1.05), say"
            )
        if not ends:
            raise UnsupportedControlError(
                "exponential_decay_length_penalty needs an end of sequence: "
                "pass eos_token_id"
            )
        steps.add(
            "exponential_decay_length_penalty",
            decay,
            lambda: hf.ExponentialDecayLengthPenalty(tuple(decay), ends, n),
        )
    if (never := value("suppress_tokens")) is not None:
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = value(name)
            wanted = {forced} if isinstance(forced, int) else set(forced or ())
            if wanted and wanted <= set(never):
                raise UnsupportedControlError(
                    f"{name}={forced!r} is in suppress_tokens; take it out of either"
                )
        steps.add(
            "suppress_tokens",
            never,
            lambda: hf.SuppressTokensLogitsProcessor(never, device=on),
        )
    if (unfit := value("begin_suppress_tokens")) is not None:
        begin = n if n > 1 or first is None else n + 1
        steps.add(
            "begin_suppress_tokens",
            unfit,
            lambda: hf.SuppressTokensAtBeginLogitsProcessor(unfit, begin, device=on),
        )
    return steps


def _merged(own: _Steps, theirs: Sequence[Any]) -> _Steps:
    """A caller's processor stands in for one of ours of its type; the others follow."""
    merged = _Steps()
    for step in own:
        same = (p for p in theirs if type(p) is type(step.processor))
        given = next(same, None)
        merged.append(step if given is None else Step("", given))
    for processor in theirs:
        if not any(processor is step.processor for step in merged):
            merged.append(Step("", processor))
    return merged


def _warpers(c: Controls, device: torch.device) -> _Steps:
    steps, value = _Steps(), c.extra.get
    temperature, top_k, top_p, min_p = c.temperature, c.top_k, c.top_p, c.min_p
    if temperature != 1:
        steps.add(
            "temperature",
            temperature,
            lambda: hf.TemperatureLogitsWarper(float(temperature)),
        )
    if (top_h := value("top_h")) is not None:
        steps.add("top_h", top_h, lambda: hf.TopHLogitsWarper(top_h))
    if top_k:
        steps.add("top_k", top_k, lambda: hf.TopKLogitsWarper(int(top_k)))
    if top_p < 1:
        steps.add("top_p", top_p, lambda: hf.TopPLogitsWarper(float(top_p)))
    if min_p:
        steps.add("min_p", min_p, lambda: hf.MinPLogitsWarper(float(min_p)))
    if (mass := value("typical_p")) is not None and mass < 1:
        steps.add("typical_p", mass, lambda: hf.TypicalLogitsWarper(mass=float(mass)))
    if (epsilon := value("epsilon_cutoff")) is not None and 0 < epsilon < 1:
        steps.add(
            "epsilon_cutoff", epsilon, lambda: hf.EpsilonLogitsWarper(float(epsilon))
        )
    if (eta := value("eta_cutoff")) is not None and 0 < eta < 1:
        steps.add(
            "eta_cutoff",
            eta,
            lambda: hf.EtaLogitsWarper(float(eta), device=str(device)),
        )
    return steps


def _pairs(bias: Any) -> Any:
    """Stored as JSON, tuples of ids are lists, which transformers takes as well."""
    return dict(bias) if hasattr(bias, "items") else [list(pair) for pair in bias]


class Processors:
    """The controls as a function of ids and logits, for one prompt.

    Scores are transformers' own processors' in transformers' order.

    Args:
        steps: Those in force; None: all that the controls ask for.
        constraint: The language that the output must be in, if any.
    """

    def __init__(
        self,
        controls: Controls,
        prompt_length: int,
        device: torch.device,
        steps: Sequence[Step] | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.temperature = controls.temperature
        self.greedy = controls.temperature == 0
        self._given = controls, prompt_length, device
        self._steps = (
            steps_of(controls, prompt_length, device, constraint)
            if steps is None
            else steps
        )
        prepared = controls.prepared
        self._device = device if prepared is None else prepared.device
        padding = () if prepared is None else prepared.padding
        self._past = GrowingTensor(self._device, padding)
        # Of drafts nothing is recorded.
        whole = prepared if steps is None else None
        self._recorded = None if whole is None else whole.recorded

    @property
    def trivial(self) -> bool:
        """Whether scores of tokens that are legal are the logits as they are, and none
        are recorded."""
        recorded = self._recorded is not None and self._recorded.wanted
        return not recorded and all(step.constrains for step in self._steps)

    @property
    def keeps_last(self) -> bool:
        """Whether a single legal token is chosen, whatever its logits are."""
        return all(step.constrains or step.name in WARPERS for step in self._steps)

    @property
    def pure(self) -> bool:
        """Whether all are known to be functions of ids and scores.

        Others (a grammar moves on with each call) are asked once for each emitted
        token, in order, and never about a draft.
        """
        return all(step.pure for step in self._steps)

    def for_drafts(self) -> Processors:
        """Those that may be asked about any continuation, in any order."""
        return Processors(*self._given, [step for step in self._steps if step.pure])

    def __call__(self, ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Scores ``[vocab]`` (float32) of the token after ``ids``.

        Raises:
            UnsupportedControlError: if a control doesn't fit the vocabulary.
        """
        raw = logits.to(self._device, torch.float32)
        scores = self._applied(ids, raw) if self._steps else raw
        if self._recorded is not None:
            self._recorded.add(raw, scores)
        return scores

    def _applied(self, ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        past = self._past.of(ids)
        scores = logits[None].clone()
        for name, processor in self._steps:
            try:
                scores = processor(past, scores)
            except (ValueError, IndexError) as error:
                if not name:  # a caller's own
                    raise
                if not math.isfinite(float(scores.amax())):
                    break  # nothing is left to choose from, which the sampler says
                text = str(error).strip().splitlines()
                raise UnsupportedControlError(
                    f"{name} can't be applied: {text[0] if text else error!r}"
                ) from None
            if getattr(scores, "shape", None) != (1, len(logits)):
                raise UnsupportedControlError(
                    f"a logits processor must return scores of shape [1, {len(logits)}]"
                    f", {type(processor).__name__} returned {_shown(scores)}; let it "
                    "return the scores that it is given, changed or not"
                )
        return scores[0]


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {list(shape)}"
