"""Bind a loaded model's ``generate`` to a decoder."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationMixin, StopStringCriteria

from adaptspec.decoder import Decoder, load
from adaptspec.decoding.generation_fields import FIELDS
from adaptspec.drop_in.arguments import CACHES, check_model, refusal
from adaptspec.errors import UnsupportedControlError
from adaptspec.model.loading import check_module
from adaptspec.model.views import unwrapped

OWN = ("prompt_class", "strategy", "params")


class SpeedUp:
    """A model's ``generate`` through a decoder; call it as you call that.

    :func:`speed_up` binds it to the model. Unbound, it leaves the model as it is.

    Args:
        model: A loaded model of transformers: the decoder's.
        decoder: What decodes.
        prompt_class: Of all prompts, where a call says nothing else; so the next two.
    """

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        prompt_class: str | None = None,
        strategy: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        check_model(decoder.model, model)
        # A compiled module asks the one inside for its generate.
        self.model: Any = unwrapped(model)
        self.decoder = decoder
        self._defaults = dict(zip(OWN, (prompt_class, strategy, params), strict=True))
        # Not what may be bound to this very object.
        of_class: Any = type(self.model)
        self._plain = types.MethodType(of_class.generate, self.model)
        self.__signature__ = _signature(self._plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own ``generate``, with its arguments, and more.

        Args:
            **kwargs: Also ``prompt_class``, ``strategy`` and ``params``, as in
                :meth:`~adaptspec.decoder.Decoder.generate`.

        Raises:
            UnsupportedControlError: naming an argument that can't be honoured.
        """
        given = dict(self.__signature__.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        if given.get("custom_generate") is not None:
            return self._plain(**given)  # a caller's own loop
        if getattr(given.get("generation_config"), "is_assistant", None):
            return self._plain(**given)  # drafts of another model's generate
        stored = getattr(self.model, "generation_config", None)
        _refuse_undecoded(given, stored)
        defaults = dict(self._defaults)
        if "strategy" in given:
            defaults["params"] = None  # those of another strategy
        own = {n: given.pop(n, value) for n, value in defaults.items()}
        streamer = given.get("streamer")
        self._bind_stop_strings(given, stored)

        def decode(
            model: Any,
            input_ids: Any,
            logits_processor: Sequence[Any],
            stopping_criteria: Sequence[Any],
            generation_config: Any,
            **arguments: Any,
        ) -> Any:
            return self.decoder(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                **own,
                adaptspec_streamer=streamer,
                **arguments,
            )

        return self._plain(**given, custom_generate=decode)

    def bind(self) -> SpeedUp:
        """Put it in the place of the model's ``generate``."""
        bound = vars(self.model).get("generate")
        if isinstance(bound, SpeedUp):
            if bound.model is self.model:  # else this is a shallow copy of that one
                bound.restore()
        elif bound is not None and not self._is_plain(bound):
            raise UnsupportedControlError(
                f"generate of this {type(self.model).__name__} was replaced already, "
                f"by {type(bound).__name__}; del model.generate first"
            )
        self.model.generate = self
        return self

    def _is_plain(self, generate: Any) -> bool:
        """Whether it is the class's, which a copy of a bound model has as its own."""
        of_class: Any = type(self.model)
        return getattr(generate, "__func__", None) is of_class.generate

    def restore(self) -> None:
        """Give the model its own ``generate`` back, and keep what was learnt."""
        if vars(self.model).get("generate") is self:
            del self.model.generate
        self.decoder.save()

    def __enter__(self) -> SpeedUp:
        """Itself, for a block at whose end it is restored."""
        return self

    def __exit__(self, *error: object) -> None:
        """Restore."""
        self.restore()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model has its own ``generate``."""
        return _itself, (self._plain,)

    def _bind_stop_strings(self, given: dict[str, Any], stored: Any) -> None:
        """Pass stop strings as a criterion: a callable gets no tokenizer."""
        tokenizer = given.pop("tokenizer", None) or self.decoder.model.tokenizer
        config: Any = given.get("generation_config")
        strings = _in_force("stop_strings", given, stored)
        if strings is None:
            return
        if tokenizer is None:
            why = "no tokenizer is known"
            way = "pass tokenizer= to generate or to speed_up"
            raise refusal("stop_strings", strings, why, way)
        given.pop("stop_strings", None)
        if getattr(config, "stop_strings", None) is not None:
            given["generation_config"] = config = copy.deepcopy(config)
            config.stop_strings = None
        if getattr(stored, "stop_strings", None) is not None:
            given["stop_strings"] = None
        criteria = list(given.get("stopping_criteria") or ())
        if not any(type(one) is StopStringCriteria for one in criteria):
            criteria.append(StopStringCriteria(tokenizer, strings))
        given["stopping_criteria"] = type(given.get("stopping_criteria") or [])(
            criteria
        )


def speed_up(
    model: Any,
    tokenizer: Any = None,
    *,
    prompt_class: str | None = None,
    strategy: str | None = None,
    params: Mapping[str, Any] | None = None,
    **load_arguments: Any,
) -> SpeedUp:
    """Let ``model.generate(...)`` decode through AdaptSpec, with its usual arguments.

    Only this object's ``generate`` is replaced, until ``restore()`` or the end of a
    ``with`` block.

    Args:
        model: A loaded ``AutoModelForCausalLM``.
        tokenizer: Its tokenizer, which tells prompts' classes and stop strings; None:
            the one beside the model's weights.
        prompt_class: The class of all prompts; None: told from each prompt.
        strategy: Overrides the choice.
        params: The strategy's parameters.
        **load_arguments: As :func:`adaptspec.load` takes them: ``db``,
            ``draft_model``, ``learn``, ``allow_lossy`` and others.

    Returns:
        What stands in for ``generate``: its ``decoder.last`` has the result of each
        row, ``decoder.save`` writes down what was learnt.

    Raises:
        ModelLoadError: if the model can't be decoded.
        UnsupportedControlError: if its ``generate`` was replaced by something else.
    """
    check_module(model)
    decoder = load(model, tokenizer=tokenizer, **load_arguments)
    _ = decoder.model.capability  # what can't be decoded is refused here, not later
    return SpeedUp(model, decoder, prompt_class, strategy, params).bind()


def _itself(value: Any) -> Any:
    return value


def _signature(plain: Any) -> inspect.Signature:
    """Its own, or that of transformers where a wrapper hands on whatever it gets."""
    own = inspect.signature(plain)
    if all(p.kind is not p.VAR_POSITIONAL for p in own.parameters.values()):
        return own
    mixin = inspect.signature(GenerationMixin.generate)
    return mixin.replace(parameters=list(mixin.parameters.values())[1:])


def _in_force(name: str, given: Mapping[str, Any], stored: Any) -> Any:
    """A field's value as ``generate`` has it: given, in the object, or stored."""
    if name in given:
        return given[name]  # None switches off what is stored
    configs = given.get("generation_config"), stored
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def _refuse_undecoded(given: Mapping[str, Any], stored: Any) -> None:
    """Refuse arguments that transformers uses up before it calls what decodes.

    Args:
        stored: The model's ``GenerationConfig``.
    """
    drafts = "AdaptSpec drafts by itself"
    for name, why in (
        ("assistant_model", drafts),
        ("assistant_tokenizer", drafts),
        ("synced_gpus", "one process decodes"),
    ):
        if given.get(name) not in (None, False):
            raise refusal(name, given[name], why, "leave it out")
    for name in CACHES:
        if given.get(name) is not None:
            why = "a decoder keeps a cache of its own and reads the whole prompt"
            way = "leave it out and pass the whole text as input_ids"
            raise refusal(name, given[name], why, way)
    early = "transformers decodes or changes the prompt before a decoder is asked"
    for name, unfit, why in (
        ("cache_implementation", "paged", early),
        ("cache_implementation", "quantized", FIELDS["cache_implementation"].note),
        ("token_healing", True, early),
    ):
        value = _in_force(name, given, stored)
        if value == unfit:
            raise refusal(name, value, why, f"pass {name}=None")
