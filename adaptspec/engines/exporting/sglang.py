"""SGLang's flags for what was measured on another engine.

Its arguments are those of ``sglang/srt/arg_groups`` (November 2026): ``NGRAM``,
``STANDALONE``, ``EAGLE`` and ``EAGLE3``. Nothing is measured on SGLang.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaptspec.engines.exporting.measured import Setting
from adaptspec.engines.inference_engine import EngineOptions, Launch
from adaptspec.errors import EngineError
from adaptspec.params import Scalar

NAME = "sglang"
FROM = ("vllm", "llama.cpp")  # whose profiles are translated, the first that has any
NOT_MEASURED = "not measured on SGLang"
TRIE_DEPTH = 18  # of its n-gram cache unless told; a draft is no longer than it

Params = Mapping[str, Scalar]


@dataclass(frozen=True)
class Translation:
    """How SGLang is told a method.

    Args:
        algorithm: Its ``--speculative-algorithm``.
        drafted: The parameter that says how many tokens are drafted at most.
        needs: What weights it takes: ``draft``, ``heads``, or none of its own.
        kept: Other parameters that are carried over.
        least: The parameter that so many tokens are drafted at least.
    """

    algorithm: str
    drafted: str
    needs: str | None = None
    kept: Sequence[str] = ()
    least: str | None = None


_TOKENS, _MOST = "num_speculative_tokens", "draft_n_max"
_NGRAM = Translation("NGRAM", "size_m", None, ("size_n",))
METHODS: Mapping[str, Mapping[str, Translation]] = {
    "vllm": {
        "ngram": Translation("NGRAM", _TOKENS, None, ("prompt_lookup_max",)),
        "ngram_gpu": Translation("NGRAM", _TOKENS, None, ("prompt_lookup_max",)),
        "draft_model": Translation("STANDALONE", _TOKENS, "draft"),
        "eagle": Translation("EAGLE", _TOKENS, "heads"),
        "eagle3": Translation("EAGLE3", _TOKENS, "heads"),
        "mtp": Translation("EAGLE", _TOKENS),
    },
    "llama.cpp": {
        "ngram_simple": replace(_NGRAM, least="size_n"),  # as it was started
        "ngram_map_k": _NGRAM,
        "ngram_map_k4v": _NGRAM,
        "ngram_mod": Translation("NGRAM", "n_max", None, ("n_match",)),
        "draft_simple": Translation("STANDALONE", _MOST, "draft"),
        "draft_eagle3": Translation("EAGLE3", _MOST, "draft"),
        "draft_mtp": Translation("EAGLE", _MOST),
    },
}


def untranslatable(engine: str, setting: Setting) -> str | None:
    """Why SGLang can't do what another engine's setting does; None if it can."""
    if setting.params.get("use_heterogeneous_vocab"):
        return "SGLang has no draft models of another vocabulary than the target's"
    if setting.is_plain or setting.method in METHODS[engine]:
        return None
    known = ", ".join(METHODS[engine])
    return f"SGLang has no method like {engine}'s {setting.method} (has: {known})"


def launch(engine: str, setting: Setting, options: EngineOptions) -> Launch:
    """How SGLang is started with what was measured on ``engine``.

    Args:
        options: Its models, as SGLang takes them.

    Raises:
        EngineError: if a model is missing that it can load, or the method.
    """
    model = _folder(options.model, "--model", "the target")
    command = ["python3", "-m", "sglang.launch_server", "--model-path", model]
    if options.dtype != "auto":
        command += ["--dtype", options.dtype]
    if options.context is not None:
        command += ["--context-length", str(options.context)]
    if options.trust_remote_code:
        command.append("--trust-remote-code")
    notes = [
        f"It is {NOT_MEASURED}: the setting was found on {engine}, and SGLang's speed "
        "with it is unknown."
    ]
    if options.context is not None:
        notes.append(
            "--context-length is the longest prompt with its answer that was measured; "
            "leave it out to serve as long ones as the model knows."
        )
    if options.arguments:
        told = shlex.join(options.arguments)
        notes.append(
            f"Arguments of {engine} aren't translated ({told}): add SGLang's own."
        )
    if not setting.is_plain:
        if (reason := untranslatable(engine, setting)) is not None:
            raise EngineError(f"{reason}; choose another engine, or tune without it")
        translation = METHODS[engine][setting.method]
        speculative, more = _speculative(translation, setting.params, options)
        command += speculative
        notes += more
    return Launch(command, notes=notes)


def _speculative(
    translation: Translation, params: Params, options: EngineOptions
) -> tuple[list[str], list[str]]:
    """Flags of a method, and what it does otherwise than where it was measured."""
    drafted = int(params.get(translation.drafted, 0))
    if drafted < 1:
        raise EngineError(
            f"the profile doesn't say {translation.drafted}, so SGLang can't be told "
            "how many tokens are drafted; run tune again"
        )
    if translation.least is not None:
        drafted = max(drafted, int(params.get(translation.least, 0)))
    flags = ["--speculative-algorithm", translation.algorithm]
    used = {translation.drafted, *translation.kept}
    notes = []
    if translation.algorithm == "NGRAM":
        flags += ["--speculative-num-draft-tokens", str(drafted + 1)]
        # One chain, as where it was measured; by default SGLang drafts a tree.
        flags += ["--speculative-ngram-max-bfs-breadth", "1"]
        matched = max(int(params.get(name, 0)) for name in translation.kept)
        if matched + drafted > TRIE_DEPTH:
            depth = str(matched + drafted)
            flags += ["--speculative-ngram-max-trie-depth", depth]
        notes.append(
            "SGLang's n-gram cache holds the answers of all requests, and it looks for "
            "the longest match of any length. By its documentation NGRAM runs on CUDA "
            "alone."
        )
    else:
        if translation.needs is not None:
            flags += ["--speculative-draft-model-path", _weights(translation, options)]
        flags += ["--speculative-num-steps", str(drafted)]
        flags += ["--speculative-eagle-topk", "1"]
        flags += ["--speculative-num-draft-tokens", str(drafted + 1)]
    if lost := [f"{k}={v}" for k, v in params.items() if k not in used]:
        notes.append(f"SGLang has nothing like {', '.join(lost)}, so it isn't told.")
    return flags, notes


def _weights(translation: Translation, options: EngineOptions) -> str:
    """The draft model or the heads of a method."""
    if translation.needs == "draft":
        told = "draft head" if translation.algorithm == "EAGLE3" else "draft model"
        return _folder(options.draft_model, "--draft-model", f"the {told}")
    kind = translation.algorithm.lower()
    heads = list(options.heads)
    named = [path for path in heads if _plain(Path(path).name).count(kind)]
    # "eagle" is part of "eagle3".
    exact = [
        p for p in named if ("eagle3" in _plain(Path(p).name)) == (kind[-1] == "3")
    ]
    chosen = exact if len(heads) > 1 else heads
    if len(chosen) != 1:
        raise EngineError(
            f"SGLang needs the {translation.algorithm} heads; give them alone: "
            "--heads FOLDER"
        )
    return _folder(chosen[0], "--heads", "the heads")


def _folder(given: str | None, option: str, what: str) -> str:
    if given is None or given.endswith(".gguf"):
        told = "none is told" if given is None else f"{given} is llama.cpp's"
        raise EngineError(
            f"SGLang takes {what} as a folder or a hub name, and {told}; pass {option}"
        )
    return given


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
