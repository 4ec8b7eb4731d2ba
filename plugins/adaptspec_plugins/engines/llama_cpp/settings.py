"""llama.cpp's speculative types, their parameters, and the options that say them.

Ranges and rules follow ``common/speculative.cpp`` and ``common/ngram-map.cpp`` of
llama.cpp. Defaults are those that its documentation gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from adaptspec.engines.inference_engine import PLAIN_METHOD, Method
from adaptspec.errors import EngineError
from adaptspec.params import Params, Scalar, Tunable
from adaptspec.strategy import NoParams


class NgramLookup(Params):
    """What follows an earlier n-gram is drafted: sizes of both."""

    size_n: Annotated[int, Tunable(2, 24, log=True)] = Field(
        default=12, ge=1, le=1024, description="tokens that must occur again"
    )
    size_m: Annotated[int, Tunable(2, 64, log=True)] = Field(
        default=48, ge=1, le=1024, description="most tokens drafted after a match"
    )


class NgramSimple(NgramLookup):
    """Never a draft shorter than what had to match: ngram-simple drops those."""

    size_m: Annotated[int, Tunable(2, 64, log=True)] = Field(
        default=48,
        ge=1,
        le=1024,
        description="most tokens drafted after a match; at least size_n is told, "
        "as ngram-simple drafts nothing with less",
    )


class NgramMapK4V(NgramLookup):
    """As above, with the number of matches that a draft takes."""

    min_hits: Annotated[int, Tunable(1, 4)] = Field(
        default=1, ge=1, le=1024, description="matches before anything is drafted"
    )


class NgramMod(Params):
    """A hash of the last tokens leads to the next one, as often as it is known."""

    n_match: Annotated[int, Tunable(4, 32, log=True)] = Field(
        default=24, ge=1, le=1024, description="tokens that are looked up"
    )
    n_min: Annotated[int, Tunable(0, 48)] = Field(
        default=48,
        ge=0,
        le=1024,
        description="fewest tokens drafted; at most n_max is told",
    )
    n_max: Annotated[int, Tunable(2, 64, log=True)] = Field(
        default=64, ge=1, le=1024, description="most tokens drafted"
    )


class Drafted(Params):
    """How much a draft model drafts."""

    draft_n_max: Annotated[int, Tunable(1, 16)] = Field(
        default=3, ge=1, le=1024, description="most tokens drafted"
    )
    draft_n_min: Annotated[int, Tunable(0, 4)] = Field(
        default=0,
        ge=0,
        le=1024,
        description="shorter drafts are dropped; at most draft_n_max is told",
    )
    draft_p_min: Annotated[float, Tunable(0.0, 0.9, step=0.05)] = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="the draft ends before a token that its model finds less probable",
    )


class NgramSimpleDrafted(NgramSimple, Drafted):
    """Of both."""


class NgramLookupDrafted(NgramLookup, Drafted):
    """Of both."""


class NgramMapK4VDrafted(NgramMapK4V, Drafted):
    """Of both."""


class NgramModDrafted(NgramMod, Drafted):
    """Of both."""


class NgramMapK4VMod(NgramMapK4V, NgramMod):
    """Of both."""


@dataclass(frozen=True)
class Kind:
    """A type that ``--spec-type`` takes.

    Args:
        word: Its name there.
        summary: What it does, in a line.
        params: Its own parameters.
        options: Parameter -> the option that says it.
        limits: Parameter -> another one and whether it is its ``most`` or ``least``.
        opening: Parameters that a tune begins with: the defaults look for longer
            repetitions than most texts have, and let a draft model guess on.
        keeps: Whether its memory of earlier requests can be drafted from.
        forgets: Whether a short request empties its slot's memory.
        in_service: What its memory makes of a server that runs on, for a user.
    """

    word: str
    summary: str
    params: type[Params] = NoParams
    options: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    opening: Mapping[str, Scalar] = field(default_factory=dict)
    keeps: bool = False
    forgets: bool = False
    in_service: str = ""

    def arguments(self, values: Mapping[str, Scalar]) -> list[str]:
        """The options of a setting, defaults too."""
        told = self.params.parse(values, self.word).model_dump()
        for name, (limit, which) in self.limits.items():
            pick = min if which == "most" else max
            told[name] = pick(told[name], told[limit])
        return [
            word
            for name, option in self.options.items()
            for word in (option, f"{told[name]:g}")
        ]


def _lookup_options(kind: str, *more: str) -> dict[str, str]:
    names = ("size_n", "size_m", *more)
    return {name: f"--spec-{kind}-{name.replace('_', '-')}" for name in names}


DRAFT_OPTIONS = {
    "draft_n_max": "--spec-draft-n-max",
    "draft_n_min": "--spec-draft-n-min",
    "draft_p_min": "--spec-draft-p-min",
}
DRAFT_LIMITS = {"draft_n_min": ("draft_n_max", "most")}


def _drafted(word: str, summary: str) -> Kind:
    opening = {"draft_n_max": 4, "draft_p_min": 0.6}
    return Kind(word, summary, Drafted, DRAFT_OPTIONS, DRAFT_LIMITS, opening)


SHORT = {"size_n": 3, "size_m": 8}
MAPS_IN_SERVICE = (
    "each prompt was measured with an empty table of n-grams; in service a slot's "
    "table keeps positions of its last request and finds less"
)
NGRAMS = {
    # `min-hits` exists for it and for ngram-map-k, but neither reads it.
    "ngram_simple": Kind(
        "ngram-simple",
        "copies what followed the last same n-gram in the request",
        NgramSimple,
        _lookup_options("ngram-simple"),
        {"size_m": ("size_n", "least")},
        opening=SHORT,
    ),
    "ngram_map_k": Kind(
        "ngram-map-k",
        "the same with a table of n-grams, and with shorter drafts where they failed",
        NgramLookup,
        _lookup_options("ngram-map-k"),
        opening=SHORT,
        forgets=True,
        in_service=MAPS_IN_SERVICE,
    ),
    "ngram_map_k4v": Kind(
        "ngram-map-k4v",
        "drafts the most frequent of up to four continuations of an n-gram",
        NgramMapK4V,
        _lookup_options("ngram-map-k4v", "min_hits"),
        opening=SHORT,
        forgets=True,
        in_service=MAPS_IN_SERVICE,
    ),
    "ngram_mod": Kind(
        "ngram-mod",
        "a table of hashed n-grams, which all requests of the server fill",
        NgramMod,
        {
            "n_match": "--spec-ngram-mod-n-match",
            "n_min": "--spec-ngram-mod-n-min",
            "n_max": "--spec-ngram-mod-n-max",
        },
        {"n_min": ("n_max", "most")},
        opening={"n_match": 8, "n_min": 2, "n_max": 16},
        keeps=True,
        in_service="ngram-mod drafts from earlier requests, too: a prompt that comes "
        "again gains more than was measured",
    ),
    "ngram_cache": Kind(
        "ngram-cache",
        "counts of n-grams of a slot's longest requests; 8 tokens at most",
        keeps=True,
        # `cache_size` of its sequences never shrinks, and `begin` does nothing.
        in_service="ngram-cache enters of a request only what lies behind the longest "
        "one that its slot has had: a server that has run for long hardly drafts from "
        "the request itself, and gains less than was measured",
    ),
}
DRAFTS = {
    "draft_simple": _drafted("draft-simple", "a smaller model drafts"),
    "draft_eagle3": _drafted("draft-eagle3", "an EAGLE-3 draft model"),
    "draft_mtp": _drafted("draft-mtp", "layers that predict several tokens ahead"),
    "draft_dflash": _drafted("draft-dflash", "a DFlash model drafts blocks"),
    "draft_dspark": _drafted("draft-dspark", "a DSpark model drafts blocks"),
}
KINDS: Mapping[str, Kind] = {**NGRAMS, **DRAFTS}
# A draft model is asked where the n-grams find nothing.
BEFORE_DRAFTS: Mapping[str, type[Params]] = {
    "ngram_simple": NgramSimpleDrafted,
    "ngram_map_k": NgramLookupDrafted,
    "ngram_map_k4v": NgramMapK4VDrafted,
    "ngram_mod": NgramModDrafted,
}
# Two kinds in the order in which llama.cpp asks them -> parameters.
COMBINED: Mapping[tuple[str, str], type[Params]] = {
    ("ngram_map_k4v", "ngram_mod"): NgramMapK4VMod,
    **{(n, d): params for n, params in BEFORE_DRAFTS.items() for d in DRAFTS},
}


def kinds_of(method: str) -> tuple[Kind, ...]:
    """The types that a method of :func:`all_methods` turns on; none: plain decoding."""
    if method == PLAIN_METHOD.name:
        return ()
    if method in KINDS:
        return (KINDS[method],)
    for first, second in COMBINED:
        if method == f"{first}_{second}":
            return KINDS[first], KINDS[second]
    raise EngineError(
        f"llama.cpp: no method {method!r}; known: {', '.join(all_methods())}"
    )


def uses_draft(method: str) -> str | None:
    """The kind of draft model that a method needs, or None."""
    return next((draft for draft in DRAFTS if method.endswith(draft)), None)


def all_methods() -> dict[str, Method]:
    """Every method that this file knows, plain decoding first."""
    found = {PLAIN_METHOD.name: PLAIN_METHOD}
    for name, kind in KINDS.items():
        found[name] = Method(
            name, kind.summary, kind.params, general=False, opening=kind.opening
        )
    for (first, second), params in COMBINED.items():
        name = f"{first}_{second}"
        words = KINDS[first].word, KINDS[second].word
        summary = "{} and, where it finds nothing, {}".format(*words)
        opening = {**KINDS[first].opening, **KINDS[second].opening}
        found[name] = Method(
            name, summary, params, general=second in DRAFTS, opening=opening
        )
    return found


def arguments_of(method: str, params: Mapping[str, Scalar]) -> list[str]:
    """``--spec-type`` and the options of a setting; empty for plain decoding.

    Raises:
        InvalidParamsError: if ``params`` aren't the method's.
    """
    kinds = kinds_of(method)
    all_methods()[method].Params.parse(params, method)
    if not kinds:
        return []
    words = ["--spec-type", ",".join(kind.word for kind in kinds)]
    for kind in kinds:
        own = {k: v for k, v in params.items() if k in kind.params.model_fields}
        words += kind.arguments(own)
    return words


def missing_options(
    method: str, options: frozenset[str], types: frozenset[str]
) -> Sequence[str]:
    """What a program lacks for a method."""
    return [
        missing
        for kind in kinds_of(method)
        for missing in (
            *([] if kind.word in types else [f"--spec-type {kind.word}"]),
            *(o for o in kind.options.values() if o not in options),
        )
    ]
