"""The generation controls: what is honoured, what is refused by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from adaptspec.decoding.generation_fields import FIELDS, refuse_unsupported
from adaptspec.errors import UnsupportedControlError

if TYPE_CHECKING:
    from adaptspec.decoding.prepared import Prepared
    from adaptspec.model.language_model import LanguageModel

DEFAULT_NEW_TOKENS = 128

# Of generate's sampling, where nothing sets it.
DEFAULT_TOP_K = 50

WHOLE = ("max_new_tokens", "max_length", "top_k", "max_nodes", "seed")

# None says "as the model's configuration has it" for these, "off" for other fields.
UNSAID = ("max_new_tokens", "temperature", "do_sample")

# What the output must be; one at most.
LANGUAGES = ("json_schema", "regex", "grammar")

# Fields of Controls.extra.
EXTRA = (
    "min_length",
    "min_new_tokens",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "remove_invalid_values",
    "renormalize_logits",
)


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
            One that keeps state, such as a grammar, is asked as ``generate`` asks it:
            once for each emitted token.
        eos_token_ids: Any of them ends the output, itself included.
        stop_strings: The output ends with the token that completes one of them.
        seed: Of the sampling noise; None draws one from torch's generator.
        max_nodes: Most candidates verified in one step.
        max_length: Most tokens, those of the prompt included, in place of
            ``max_new_tokens``.
        max_time: Seconds after which no further step is begun.
        json_schema: The output is JSON of this schema: a mapping, ``True`` (any value),
            JSON text, or a pydantic model class. At most one of these three is given;
            see :mod:`adaptspec.structured`.
        regex: The output matches this whole regular expression.
        grammar: The output is in the language of this context-free grammar (GBNF or
            Lark).
        extra: Other fields of ``GenerationConfig`` that are honoured (:data:`EXTRA`).
        prepared: What transformers made of a caller's controls. Only the length, the
            ends of sequence, ``max_nodes``, and whether the temperature is 0, are then
            taken from this object.
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
    seed: int | None = None
    max_nodes: int = 128
    max_length: int | None = None
    max_time: float | None = None
    json_schema: Any = None
    regex: str | None = None
    grammar: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    prepared: Prepared | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 1, None),
            ("max_length", 1, None),
            ("top_k", 0, None),
            ("max_nodes", 0, None),
            ("seed", -math.inf, None),
            ("temperature", 0, None),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("max_time", 0, None),
            ("repetition_penalty", 0, None),
        ):
            value: Any = getattr(self, name)
            if value is None and name in ("max_length", "max_time", "seed"):
                continue
            kind = Integral if name in WHOLE else Real
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not is_number:
                noun = "a whole number" if name in WHOLE else "a number"
                raise UnsupportedControlError(f"{name} must be {noun}, got {value!r}")
            if not value >= low or (high is not None and value > high):
                bounds = f">= {low}" if high is None else f"in {low}..{high}"
                raise UnsupportedControlError(f"{name} must be {bounds}, got {value}")
        if self.repetition_penalty == 0:
            raise UnsupportedControlError("repetition_penalty must be above 0, got 0")
        given = [n for n in LANGUAGES if getattr(self, n) is not None]
        if len(given) > 1:
            raise UnsupportedControlError(
                f"one of {', '.join(LANGUAGES)} at most, got {' and '.join(given)}"
            )
        for name in ("regex", "grammar"):
            text: Any = getattr(self, name)
            if not isinstance(text, str | None):
                raise UnsupportedControlError(f"{name} must be a text, got {text!r}")
        if not isinstance(self.logits_processor, Sequence) or not all(
            callable(processor) for processor in self.logits_processor
        ):
            raise UnsupportedControlError(
                "logits_processor must be a list of callables, "
                f"got {type(self.logits_processor).__name__}"
            )

    @classmethod
    def greedy(cls, max_new_tokens: int, eos_token_ids: Sequence[int] = ()) -> Controls:
        """The most likely token each time, nothing else."""
        return cls(max_new_tokens=max_new_tokens, eos_token_ids=tuple(eos_token_ids))

    @classmethod
    def for_model(cls, model: LanguageModel, **overrides: Any) -> Controls:
        """The model's ``GenerationConfig``, with what is given in its place.

        ``temperature=None`` (or left out) samples if the configuration in force does.
        For fields of ``GenerationConfig`` other than :data:`UNSAID`, None is off.
        Fields that nothing sets are off, but for ``top_k``, which ``generate`` sets.

        Args:
            **overrides: Fields of :class:`Controls` and of ``GenerationConfig``, and
                ``generation_config``: an object of that class, which goes before the
                model's and after the others.

        Raises:
            UnsupportedControlError: naming each control that can't be honoured.
        """
        given = {
            name: value
            for name, value in overrides.items()
            if value is not None or (name in FIELDS and name not in UNSAID)
        }
        config = given.pop("generation_config", None)
        if config is not None and not isinstance(config, GenerationConfig):
            raise UnsupportedControlError(
                "generation_config must be a transformers GenerationConfig, "
                f"got {type(config).__name__}"
            )
        if given.get("do_sample") not in (None, True, False):
            raise UnsupportedControlError(
                f"do_sample must be True or False, got {given['do_sample']!r}; leave "
                "it out to sample where the temperature is above 0"
            )
        theirs = _fields(config)
        stored = _fields(model.generation_config) | theirs
        explicit = given.get("do_sample", theirs.get("do_sample"))
        names = {f.name for f in fields(cls)} - {"extra", "prepared"}
        if unknown := sorted(set(given) - names - set(FIELDS)):
            known = {n for n, f in FIELDS.items() if f.effect == "honoured"}
            raise UnsupportedControlError(
                f"no control {', '.join(unknown)}; "
                f"honoured: {', '.join(sorted(names | known))}"
            )
        force = {k: v for k, v in (stored | given).items() if v is not None}
        refuse_unsupported(force, given)
        if foreign := sorted(foreign_fields() & set(force)):
            raise UnsupportedControlError(
                f"{foreign[0]}={force[foreign[0]]!r} is a field that this version of "
                f"adaptspec doesn't know; pass {foreign[0]}=None"
            )
        values: dict[str, Any] = {name: force[name] for name in names if name in force}
        values["temperature"] = _temperature(force, given, explicit)
        if "top_k" not in given:
            values.setdefault("top_k", DEFAULT_TOP_K)
        if "max_new_tokens" in values:
            values.pop("max_length", None)
        if "eos_token_ids" in values:
            values["eos_token_ids"] = _ids("eos_token_ids", values["eos_token_ids"])
        else:
            eos = force.get("eos_token_id")
            if (
                eos is None
                and "eos_token_id" not in given
                and model.tokenizer is not None
            ):
                eos = model.tokenizer.eos_token_id
            values["eos_token_ids"] = _ids("eos_token_id", eos)
        values["stop_strings"] = _texts(values.get("stop_strings", ()))
        if values["stop_strings"] and model.tokenizer is None:
            raise UnsupportedControlError("stop_strings need the model's tokenizer")
        return cls(**values, extra={k: force[k] for k in EXTRA if k in force})

    @property
    def language(self) -> tuple[str, Any] | None:
        """What the output must be: one of :data:`LANGUAGES` and its value, or None."""
        values = ((name, getattr(self, name)) for name in LANGUAGES)
        return next((pair for pair in values if pair[1] is not None), None)

    def room(self, prompt_length: int) -> int:
        """Most new tokens after a prompt of so many; below 1 if there is no room."""
        if self.max_length is not None:
            return self.max_length - prompt_length
        return self.max_new_tokens

    def with_limit(self, max_new_tokens: int) -> Controls:
        """The same with another limit."""
        return replace(self, max_new_tokens=max_new_tokens, max_length=None)


def _temperature(
    force: Mapping[str, Any], given: Mapping[str, Any], explicit: bool | None
) -> float:
    """0 for greedy. ``explicit``: what the caller says of ``do_sample``, if at all."""
    if explicit is not None and not explicit:
        return 0.0
    if "temperature" not in given and not force.get("do_sample"):
        return 0.0
    temperature: float = force.get("temperature", 1.0)
    if explicit and temperature == 0:
        raise UnsupportedControlError(
            "do_sample=True needs a temperature above 0, got 0; leave do_sample out "
            "for greedy decoding"
        )
    return temperature


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """One id, several in any form, or None."""
    if value is None:
        return ()
    given = value.reshape(-1).tolist() if hasattr(value, "reshape") else value
    ids = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids):
        raise UnsupportedControlError(
            f"{name} must be the id of a token, a whole number, or a list of them, got "
            f"{value!r}; the tokenizer's convert_tokens_to_ids gives the id of a text"
        )
    return tuple(int(i) for i in ids)


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple | set | frozenset) or not all(
        isinstance(text, str) for text in texts
    ):
        raise UnsupportedControlError(
            f"stop_strings must be a text or a list of texts, got {value!r}; decode "
            "token ids and bytes first"
        )
    return tuple(texts)


def _fields(config: Any) -> dict[str, Any]:
    """The set fields of a ``GenerationConfig`` or None."""
    if config is None:
        return {}
    return {
        name: value
        for name, value in vars(config).items()
        if value is not None and (name in FIELDS or name in foreign_fields())
    }


@functools.cache
def foreign_fields() -> frozenset[str]:
    """Fields that the installed transformers has and this version doesn't know."""
    return frozenset(
        name
        for name in vars(GenerationConfig())  # type: ignore[no-untyped-call]
        if name not in FIELDS and not name.startswith("_")
    )
