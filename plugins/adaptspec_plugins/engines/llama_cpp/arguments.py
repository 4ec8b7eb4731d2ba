"""Which of ``llama-server``'s options a user may add, and what they bring."""

from __future__ import annotations

import re
from collections.abc import Sequence

from adaptspec.errors import EngineError

NO_MEMORY = "no answer may come from an earlier one's memory"
ANOTHER_MODEL = "a model is a file: --model"
ANOTHER_DRAFT = "a draft model is a file: --draft-model"
NO_KEY = "the server is started here and wants no key"
NOT_ASKED_SO = "the server is asked by its own paths, without encryption"
TRIED = "the tune tries it"

# Names with all their aliases -> why a user can't say them.
OURS = {
    "--host": "it is loopback",
    "--port": "a free one is taken",
    "-m --model": "--model",
    "-mu --model-url -dr --docker-repo --models-dir --models-preset": ANOTHER_MODEL,
    "-hf -hfr --hf-repo -hff --hf-file": ANOTHER_MODEL,
    "-md --model-draft": "--draft-model",
    "-hfd -hfrd --hf-repo-draft": ANOTHER_DRAFT,
    "-t --threads": "--threads",
    "-tb --threads-batch": "--batch-threads",
    "-c --ctx-size": "--context",
    "-np --parallel": "--concurrency",
    "-cram --cache-ram --cache-reuse -lcd --lookup-cache-dynamic": NO_MEMORY,
    "--draft-p-min": TRIED,
    "--spec-synth-len --spec-synth-rates": "what is accepted would be made up",
    "--api-key --api-key-file": NO_KEY,
    "--api-prefix --ssl-key-file --ssl-cert-file": NOT_ASKED_SO,
    "--no-slots": "the server's slots tell whether it speculates",
    "--embedding --embeddings --rerank --reranking": "no text is generated with it",
}
REASONS = {name: reason for names, reason in OURS.items() for name in names.split()}
# Where a draft model runs and how it is sampled is no part of a setting, so that a user
# may say it.
NOT_TRIED = re.compile(
    r"--(no-)?spec-draft-(threads|cpu|prio|poll|override|n-cpu|ncmoe|ngl|device|type"
    r"|sampling|backend-sampling|p-split)"
)
SPECULATING = re.compile(r"--(no-)?spec-")
TEMPLATES = ("--chat-template", "--chat-template-file")
# `--gpt-oss-20b-default`: a model, and sometimes a draft model, by their names.
PRESET = re.compile(r"--[\w.-]+-(default|spec)$")


def give_template(arguments: Sequence[str]) -> bool:
    """Whether a user's arguments bring a chat template."""
    # Underscores are read as hyphens; a value is always a word of its own.
    options = {word.replace("_", "-") for word in arguments}
    return not options.isdisjoint(TEMPLATES)


def refuse_ours(arguments: Sequence[str]) -> None:
    """Raise for an argument that would undo what the engine says itself.

    All others are passed on, and are part of what a profile holds for.

    Raises:
        EngineError: naming it and the reason.
    """
    for word in arguments:
        option = word.partition("=")[0]
        if option.startswith("--"):
            option = option.replace("_", "-")  # as llama.cpp reads it
        if (reason := _reason(option)) is not None:
            raise EngineError(
                f"llama.cpp: {option} can't be one of the engine's arguments: {reason}"
            )


def _reason(option: str) -> str | None:
    if option in REASONS:
        return REASONS[option]
    if option == "--spec-draft-model":
        return "--draft-model"
    if option == "--spec-draft-hf":
        return ANOTHER_DRAFT
    if SPECULATING.match(option) and not NOT_TRIED.match(option):
        return TRIED
    return ANOTHER_MODEL if PRESET.fullmatch(option) else None
