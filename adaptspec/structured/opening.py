"""Opens the language that a request's output must be in."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

from adaptspec.decoding.constraint import Constraint
from adaptspec.errors import UnsupportedControlError
from adaptspec.structured.languages import open_matcher
from adaptspec.structured.matcher import GrammarMatcher
from adaptspec.structured.vocabulary import vocabulary_of

if TYPE_CHECKING:
    from adaptspec.decoding.controls import Controls
    from adaptspec.model.language_model import LanguageModel


def open_constraint(
    model: LanguageModel, controls: Controls, prompt: int
) -> Constraint | None:
    """A sequence's own constraint; None where the controls ask for no language.

    Args:
        prompt: Tokens of the prompt.

    Raises:
        UnsupportedControlError: without llguidance, or a tokenizer that it can read.
        InvalidGrammarError: if the language can't be compiled; it says where.
    """
    asked = controls.language
    if asked is None:
        return None
    name, value = asked
    if find_spec("llguidance") is None:
        raise UnsupportedControlError(
            f"{name} needs llguidance: pip install 'adaptspec[structured]'"
        )
    ends = controls.eos_token_ids
    vocabulary = vocabulary_of(model, ends, name)
    matcher = open_matcher(vocabulary, name, value)
    for warning in matcher.get_grammar_warnings():
        warnings.warn(f"{name}: {' '.join(warning.split())}", stacklevel=2)
    place = GrammarMatcher(matcher, vocabulary.tokens, name, endless=not ends)
    return Constraint(place, prompt, ends)
