"""A matcher that went back stands where one stands that never went ahead."""

from __future__ import annotations

import functools
import random
import re
from typing import Any

import pytest

pytest.importorskip("llguidance")

from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits, grammar_from

from adaptspec.errors import InvalidGrammarError
from adaptspec.structured.matcher import GrammarMatcher
from adaptspec.structured.vocabulary import Vocabulary, vocabulary_of
from speakers import END, OTHER_END, VOCAB, speaker

ENDS = (END, OTHER_END)
TEXTS = (
    grammar_from("regex", "(yes|no|yesterday [0-9]{2,4}: the answer is )+"),
    grammar_from("json_schema", '{"type": "array", "items": {"enum": ["name", 3]}}'),
    grammar_from("grammar", 'root ::= item+\nitem ::= "- " [a-z]+ "\\n" | "* " item'),
    grammar_from("regex", "the answer is (42|no)"),
)


@functools.cache
def vocabulary() -> Vocabulary:
    return vocabulary_of(speaker(), ENDS, "regex")


def matcher(text: str, endless: bool = False, **arguments: Any) -> GrammarMatcher:
    inner = LLMatcher(vocabulary().tokens, text, log_level=0, **arguments)
    return GrammarMatcher(inner, vocabulary().tokens, "regex", endless)


def allowed(place: GrammarMatcher) -> list[int]:
    return [int(token) for token in place.allowed().nonzero()[:, 0]]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(text=st.sampled_from(TEXTS), seed=st.integers(0, 1 << 30), endless=st.booleans())
def test_walks_ahead_and_back_lose_nothing(text: str, seed: int, endless: bool) -> None:
    drawn = random.Random(seed)
    walker, tokens = matcher(text, endless), list[int]()
    for _ in range(25):
        fresh = matcher(text, endless)
        assert all([fresh.accept(token) for token in tokens])
        legal = allowed(fresh)
        assert fresh.finished == walker.finished
        assert fresh.forced() == walker.forced()
        what = drawn.random()
        if what < 0.3 and tokens:
            count = drawn.randint(1, len(tokens))
            walker.rollback(count)
            del tokens[len(tokens) - count :]
        elif what < 0.6:
            token = drawn.randrange(-1, VOCAB + 2)
            assert walker.accept(token) == (token in legal)
            if token in legal:
                tokens.append(token)
        elif legal:
            assert allowed(walker) == legal
            token = drawn.choice(legal)
            assert walker.accept(token)
            tokens.append(token)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_accepted_is_what_is_allowed(text: str) -> None:
    """Spellings that masks leave out included."""
    drawn, place = random.Random(1), matcher(text)
    for _ in range(12):
        legal = allowed(place)
        for token in range(VOCAB):
            accepted = place.accept(token)
            assert accepted == (token in legal)
            place.rollback(int(accepted))
        if not legal:
            break
        assert place.accept(drawn.choice(legal))


def test_nothing_follows_an_end_and_it_can_be_taken_back() -> None:
    for text, words in ((TEXTS[3], "the answer is no"), (TEXTS[0], "yes")):
        place = matcher(text)
        for token in speaker().encode(words, raw=True):
            assert place.accept(token)
        before = allowed(place)
        assert set(ENDS) <= set(before)
        for end in ENDS:
            assert place.accept(end)
            assert not place.accept(end)
            assert allowed(place) == []
            assert place.forced() == []
            place.rollback(1)
            assert allowed(place) == before


def test_forced_tokens_spell_what_must_come() -> None:
    place = matcher(TEXTS[3])
    forced = place.forced()
    text = speaker().decode(forced)
    assert len(text) > 8
    assert "the answer is ".startswith(text)
    for token in forced:
        assert allowed(place) == [token]
        assert place.accept(token)


def test_an_end_that_nobody_asked_for_never_comes() -> None:
    place = matcher(grammar_from("regex", "no"), endless=True)
    for token in speaker().encode("no", raw=True):
        assert place.accept(token)
    assert place.finished
    assert allowed(place) == []
    assert not place.accept(END)


def test_what_is_too_much_for_the_library_is_an_error_by_name() -> None:
    """It would allow the end of sequence there, whatever the grammar says."""
    text = grammar_from("json_schema", '{"type": "object"}')
    place = matcher(text, limits=LLParserLimits(step_max_items=3))
    said = re.escape("regex: it can't be followed any further: parser error")
    with pytest.raises(InvalidGrammarError, match=said):
        place.allowed()


def test_matchers_of_one_grammar_share_no_place() -> None:
    one, other = vocabulary().matcher(TEXTS[0]), vocabulary().matcher(TEXTS[0])
    assert one.consume_token(speaker().encode("yes", raw=True)[0])
    assert other.compute_bitmask() == vocabulary().matcher(TEXTS[0]).compute_bitmask()
    assert other.compute_bitmask() != one.compute_bitmask()
