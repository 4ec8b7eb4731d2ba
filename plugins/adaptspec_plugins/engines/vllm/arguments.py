"""Which of vLLM's options a user may add, and which are the engine's own."""

from __future__ import annotations

from collections.abc import Sequence

from adaptspec.errors import EngineError

TRIED = "the tune tries it"
NO_KEY = "the server is started here and wants no key"
NOT_ASKED_SO = "the server is asked by its own paths, without encryption"
COUNTED = "what was accepted comes from the server's counters"
TIES = "near ties are told by logits"

# Names with all their aliases -> why a user can't say them.
OURS = {
    "--host --uds": "it is loopback",
    "--port": "a free one is taken",
    "--model --served-model-name": "--model",
    "--speculative-config -sc --spec-method --spec-model --spec-tokens": TRIED,
    "--enable-prefix-caching": "no answer may come from an earlier one's memory",
    "--max-num-seqs": "--concurrency",
    "--max-model-len": "--context",
    "--dtype": "--dtype",
    "--trust-remote-code": "--trust-remote-code",
    "--config": "its options would go before; give each of them",
    "--api-key": NO_KEY,
    "--root-path --ssl-keyfile --ssl-certfile --ssl-ca-certs": NOT_ASKED_SO,
    "--disable-log-stats": COUNTED,
    "--logprobs-mode --max-logprobs": TIES,
    "--headless": "it is asked by HTTP",
}
REASONS = {name: reason for names, reason in OURS.items() for name in names.split()}


def refuse_ours(arguments: Sequence[str]) -> None:
    """Raise for an argument that would undo what the engine says itself.

    vLLM reads ``_`` as ``-``, the beginning of a name as the name, and what comes
    behind a dot as a field. All others are passed on, and but for the share of a GPU's
    memory are part of what a profile holds for.

    Raises:
        EngineError: naming it and the reason.
    """
    for word in arguments:
        option = word.partition("=")[0].partition(".")[0]
        if option.startswith("--"):
            option = option.replace("_", "-")
        if len(option) < 3 or not option.startswith("-"):
            continue
        for name, reason in REASONS.items():
            # `-sc` has no beginning of interest.
            if name == option or (option[:2] == "--" and name.startswith(option)):
                raise EngineError(
                    f"vllm: {option} can't be one of the engine's arguments: {reason}"
                )


def without_memory_share(arguments: Sequence[str]) -> list[str]:
    """All arguments but ``--gpu-memory-utilization`` and its value."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        option, equals, _ = word.partition("=")
        if option.replace("_", "-") != "--gpu-memory-utilization":
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept
