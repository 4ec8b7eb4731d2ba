"""What a setting says to llama.cpp."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.errors import EngineError, InvalidParamsError
from adaptspec_plugins.engines.llama_cpp.settings import (
    DRAFTS,
    all_methods,
    arguments_of,
    missing_options,
)

METHODS = all_methods()


@st.composite
def settings(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A method and values of its parameters from what is tuned."""
    name = draw(st.sampled_from(sorted(METHODS)))
    values: dict[str, Any] = {}
    for spec in METHODS[name].Params.specs():
        assert spec.tunable is not None
        low, high = spec.tunable.low, spec.tunable.high
        assert low is not None
        assert high is not None
        values[spec.name] = draw(
            st.integers(int(low), int(high))
            if spec.kind == "int"
            else st.floats(low, high)
        )
    return name, values


def as_pairs(words: list[str]) -> dict[str, str]:
    return dict(zip(words[::2], words[1::2], strict=True))


def test_plain_decoding_says_nothing() -> None:
    assert arguments_of("autoregressive", {}) == []
    assert next(iter(METHODS)) == "autoregressive"


def test_defaults_are_llama_cpps_own() -> None:
    """As `llama-server --help` and docs/speculative.md print them."""
    words = as_pairs(arguments_of("ngram_mod_draft_simple", {}))
    assert words == {
        "--spec-type": "ngram-mod,draft-simple",
        "--spec-ngram-mod-n-match": "24",
        "--spec-ngram-mod-n-min": "48",
        "--spec-ngram-mod-n-max": "64",
        "--spec-draft-n-max": "3",
        "--spec-draft-n-min": "0",
        "--spec-draft-p-min": "0",
    }
    assert as_pairs(arguments_of("ngram_map_k4v", {})) == {
        "--spec-type": "ngram-map-k4v",
        "--spec-ngram-map-k4v-size-n": "12",
        "--spec-ngram-map-k4v-size-m": "48",
        "--spec-ngram-map-k4v-min-hits": "1",
    }


@given(settings())
def test_every_tuned_value_reaches_the_program(
    setting: tuple[str, dict[str, Any]],
) -> None:
    """And no setting is one with which llama.cpp would never draft."""
    name, values = setting
    words = as_pairs(arguments_of(name, values))
    hyphened = name.partition("_draft")[0].replace("_", "-")
    first, _, second = hyphened.removeprefix("ngram-").partition("-ngram-")
    of_mod = {"n_match", "n_min", "n_max"}
    for key, value in values.items():
        kind = second if second and key in of_mod else first
        of_ngram = f"--spec-ngram-{kind}-{key}"
        option = f"--spec-{key}" if key.startswith("draft_") else of_ngram
        told = float(words.pop(option.replace("_", "-")))
        if name.startswith("ngram_simple") and key == "size_m":
            value = max(value, values["size_n"])
        if key == "n_min":
            value = min(value, values["n_max"])
        if key == "draft_n_min":
            value = min(value, values["draft_n_max"])
        assert told == pytest.approx(value, abs=1e-5)
    assert set(words) <= {"--spec-type"}


def test_a_parameter_of_another_method_is_refused() -> None:
    with pytest.raises(InvalidParamsError, match="ngram_simple: no parameter 'n_max'"):
        arguments_of("ngram_simple", {"n_max": 3})


@pytest.mark.parametrize("name", ["eagle", "ngram_simple_", "ngram_cache_draft_simple"])
def test_an_unknown_method_is_refused(name: str) -> None:
    with pytest.raises(EngineError, match=f"no method '{name}'; known: autoregressive"):
        arguments_of(name, {})


def test_what_a_version_lacks_is_named() -> None:
    options = frozenset({"--spec-draft-n-max", "--spec-draft-p-min"})
    types = frozenset({"ngram-simple"})
    assert missing_options("ngram_simple_draft_simple", options, types) == [
        "--spec-ngram-simple-size-n",
        "--spec-ngram-simple-size-m",
        "--spec-type draft-simple",
        "--spec-draft-n-min",
    ]
    assert missing_options("autoregressive", frozenset(), frozenset()) == []


def test_every_draft_kind_is_tried_alone_and_behind_n_grams() -> None:
    for draft in DRAFTS:
        alone = set(METHODS[draft].Params.model_fields)
        assert {"draft_n_max", "draft_n_min", "draft_p_min"} == alone
        behind = set(METHODS[f"ngram_simple_{draft}"].Params.model_fields)
        assert behind == alone | {"size_n", "size_m"}
