"""The generation controls: what is honoured, what is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from adaptspec.errors import UnsupportedControlError

if TYPE_CHECKING:
    from adaptspec.models import LanguageModel

DEFAULT_NEW_TOKENS = 128

# GenerationConfig fields that change the output in a way one verified pass can't give.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "guidance_scale": (None, 1, 1.0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "watermarking_config": (None,),
    "dola_layers": (None,),
    "token_healing": (None, False),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "forced_decoder_ids": (None,),
    "max_time": (None,),
    "prompt_lookup_num_tokens": (None,),
}


@dataclass(frozen=True)
class Controls:
    """How tokens are chosen and where generation ends.

    Args:
        max_new_tokens: Most tokens emitted.
        temperature: 0 is greedy; then top-k, top-p and min-p don't matter.
        top_k: 0 keeps all tokens.
        top_p: 1 keeps all tokens.
        min_p: 0 keeps all tokens.
        repetition_penalty: 1 is none.
        logits_processor: Any transformers processors, applied before the temperature.
            They must be functions of the ids they are given.
        eos_token_ids: Any of them ends the output, itself included.
        stop_strings: The output ends with the token that completes one of them.
        seed: Of the sampling noise.
        max_nodes: Most candidates verified in one step.
        extra: Other fields of the model's ``GenerationConfig`` that are honoured:
            ``no_repeat_ngram_size``, ``bad_words_ids``, ``min_length``,
            ``min_new_tokens``, ``suppress_tokens``, ``begin_suppress_tokens``,
            ``sequence_bias``, ``forced_bos_token_id``, ``forced_eos_token_id``,
            ``exponential_decay_length_penalty``, ``typical_p``, ``epsilon_cutoff``,
            ``eta_cutoff``, ``remove_invalid_values``.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logits_processor: Sequence[Any] = ()
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    max_nodes: int = 128
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 1, None),
            ("temperature", 0, None),
            ("top_k", 0, None),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("max_nodes", 0, None),
        ):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                bounds = f">= {low}" if high is None else f"in {low}..{high}"
                raise UnsupportedControlError(f"{name} must be {bounds}, got {value}")
        if self.top_p == 0:
            raise UnsupportedControlError("top_p must be above 0; use temperature=0")
        if self.repetition_penalty <= 0:
            raise UnsupportedControlError(
                f"repetition_penalty must be above 0, got {self.repetition_penalty}"
            )

    @classmethod
    def greedy(cls, max_new_tokens: int, eos_token_ids: Sequence[int] = ()) -> Controls:
        """The most likely token each time, nothing else."""
        return cls(max_new_tokens=max_new_tokens, eos_token_ids=tuple(eos_token_ids))

    @classmethod
    def for_model(cls, model: LanguageModel, **overrides: Any) -> Controls:
        """The model's ``GenerationConfig``, with what is given in its place.

        ``temperature=None`` (or left out) samples if the model's configuration does.
        Fields the configuration leaves unset are off.

        Raises:
            UnsupportedControlError: naming each control that can't be honoured.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        config = model.generation_config
        stored: dict[str, Any] = {}
        if config is not None:
            stored = {k: v for k, v in config.to_dict().items() if v is not None}
        _refuse(stored | given, given)
        given = {k: v for k, v in given.items() if k not in REFUSED}
        values: dict[str, Any] = {}
        if given.pop("do_sample", stored.get("do_sample")):
            values["temperature"] = stored.get("temperature", 1.0)
        for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
            if name in stored:
                values[name] = stored[name]
        if "max_new_tokens" in stored:
            values["max_new_tokens"] = stored["max_new_tokens"]
        eos = given.pop("eos_token_id", stored.get("eos_token_id"))
        if eos is None and model.tokenizer is not None:
            eos = model.tokenizer.eos_token_id
        values["eos_token_ids"] = _ids(eos)
        stops = given.pop("stop_strings", stored.get("stop_strings", ()))
        values["stop_strings"] = (stops,) if isinstance(stops, str) else tuple(stops)
        extra = {k: stored[k] for k in EXTRA if k in stored}
        extra.update({k: given.pop(k) for k in EXTRA if k in given})
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - names):
            known = sorted((names | set(EXTRA) | {"eos_token_id"}) - {"extra"})
            raise UnsupportedControlError(
                f"no control {', '.join(unknown)}; honoured: {', '.join(known)}"
            )
        values.update(given)
        if values["stop_strings"] and model.tokenizer is None:
            raise UnsupportedControlError("stop_strings need the model's tokenizer")
        return cls(**values, extra={k: v for k, v in extra.items() if v is not None})

    def with_limit(self, max_new_tokens: int) -> Controls:
        """The same with another limit."""
        return replace(self, max_new_tokens=max_new_tokens)


class Processors:
    """The controls as a function of ids and logits, for one prompt.

    Scores are transformers' own processors' in transformers' order.
    """

    def __init__(
        self, controls: Controls, prompt_length: int, device: torch.device
    ) -> None:
        self.temperature = controls.temperature
        self.greedy = controls.temperature == 0
        self._device = device
        processors = LogitsProcessorList()
        if controls.repetition_penalty != 1:
            processors.append(
                hf.RepetitionPenaltyLogitsProcessor(float(controls.repetition_penalty))
            )
        for name, build in EXTRA.items():
            value = controls.extra.get(name)
            if value not in (None, 0, 0.0, False, [], ()) and name not in WARPERS:
                built = build(value, controls, prompt_length, device)
                if built is not None:
                    processors.append(built)
        processors.extend(controls.logits_processor)
        if not self.greedy:
            if controls.temperature != 1:
                processors.append(
                    hf.TemperatureLogitsWarper(float(controls.temperature))
                )
            if controls.top_k:
                processors.append(hf.TopKLogitsWarper(int(controls.top_k)))
            if controls.top_p < 1:
                processors.append(hf.TopPLogitsWarper(float(controls.top_p)))
            if controls.min_p:
                processors.append(hf.MinPLogitsWarper(float(controls.min_p)))
            for name in WARPERS:
                value = controls.extra.get(name)
                if value not in (None, 0, 0.0, 1, 1.0):
                    built = EXTRA[name](value, controls, prompt_length, device)
                    processors.append(built)
        self._processors = processors

    @property
    def trivial(self) -> bool:
        """Whether scores are the logits as they are."""
        return not self._processors

    def __call__(self, ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Scores ``[vocab]`` (float32) of the token after ``ids``."""
        scores = logits.float()
        if not self._processors:
            return scores
        past = torch.tensor([list(ids)], device=self._device)
        processed: torch.Tensor = self._processors(past, scores[None].clone())  # type: ignore[arg-type]
        return processed[0]


def _build_min_length(v: Any, c: Controls, n: int, d: torch.device) -> Any:
    if not c.eos_token_ids:
        return None
    return hf.MinLengthLogitsProcessor(v, list(c.eos_token_ids), device=str(d))


def _build_min_new(v: Any, c: Controls, n: int, d: torch.device) -> Any:
    if not c.eos_token_ids:
        return None
    return hf.MinNewTokensLengthLogitsProcessor(
        n, v, list(c.eos_token_ids), device=str(d)
    )


def _build_decay(v: Any, c: Controls, n: int, d: torch.device) -> Any:
    return hf.ExponentialDecayLengthPenalty(tuple(v), list(c.eos_token_ids), n)


Build = Callable[[Any, Controls, int, torch.device], Any]

EXTRA: Mapping[str, Build] = {
    "sequence_bias": lambda v, c, n, d: hf.SequenceBiasLogitsProcessor(v),
    "no_repeat_ngram_size": lambda v, c, n, d: hf.NoRepeatNGramLogitsProcessor(v),
    "bad_words_ids": lambda v, c, n, d: hf.NoBadWordsLogitsProcessor(
        v, list(c.eos_token_ids)
    ),
    "min_length": _build_min_length,
    "min_new_tokens": _build_min_new,
    "forced_bos_token_id": lambda v, c, n, d: hf.ForcedBOSTokenLogitsProcessor(v),
    "forced_eos_token_id": lambda v, c, n, d: hf.ForcedEOSTokenLogitsProcessor(
        n + c.max_new_tokens, v, device=str(d)
    ),
    "remove_invalid_values": lambda v, c, n, d: hf.InfNanRemoveLogitsProcessor(),
    "exponential_decay_length_penalty": _build_decay,
    "suppress_tokens": lambda v, c, n, d: hf.SuppressTokensLogitsProcessor(
        v, device=str(d)
    ),
    "begin_suppress_tokens": lambda v, c, n, d: hf.SuppressTokensAtBeginLogitsProcessor(
        v, n, device=str(d)
    ),
    "typical_p": lambda v, c, n, d: hf.TypicalLogitsWarper(mass=v),
    "epsilon_cutoff": lambda v, c, n, d: hf.EpsilonLogitsWarper(epsilon=v),
    "eta_cutoff": lambda v, c, n, d: hf.EtaLogitsWarper(epsilon=v, device=str(d)),
}
WARPERS = ("typical_p", "epsilon_cutoff", "eta_cutoff")


def _refuse(values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, neutral in REFUSED.items():
        value = values.get(name)
        if not any(value is n or value == n for n in neutral):
            origin = "given" if name in given else "in the model's generation_config"
            raise UnsupportedControlError(
                f"{name}={value!r} ({origin}) can't be honoured: one pass verifies "
                f"one sequence; pass {name}={neutral[-1]!r}"
                if neutral[-1] is not None
                else f"{name}={value!r} ({origin}) can't be honoured; leave it out"
            )


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, int):
        return (value,)
    if isinstance(value, torch.Tensor):
        value = value.reshape(-1).tolist()
    return tuple(int(v) for v in value)
