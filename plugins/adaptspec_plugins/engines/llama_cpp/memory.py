"""What memory a server takes, and what helps where it finds too little."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adaptspec.errors import EngineError
from adaptspec.memory import usable_memory

if TYPE_CHECKING:
    from adaptspec.engines.inference_engine import EngineOptions
    from adaptspec_plugins.engines.llama_cpp.gguf_file import GgufFile

GIB = 1 << 30
OTHER_BYTES = 512 << 20  # a server's own besides weights, keys and values
FIT_LEAVES = GIB  # of the machine's memory, by llama.cpp's `--fit`
# How a server that found too little memory ended, or what its log says.
SHORT_OF_MEMORY = re.compile(
    r"want of memory|out of memory|insufficient memory|bad_alloc|to allocate"
    r"|allocation of size",
    re.IGNORECASE,
)


def way_to_less(options: EngineOptions, model: GgufFile) -> str:
    """What a user does so that a server takes less memory."""
    if options.context is not None:
        return "a shorter --context, fewer --concurrency or a smaller model take less"
    return (
        "tell the longest prompt with its answer by --context; without it a server "
        f"takes up to {_longest(options, model)}"
    )


def refuse_what_never_fits(
    options: EngineOptions, files: Sequence[GgufFile], fits: bool, held: int
) -> None:
    """The model's own longest context may need more memory than may be used.

    llama.cpp makes it fit the machine's memory, of which other programs hold some.

    Args:
        files: The model's, and those of draft models that are loaded with it.
        fits: Whether this version does so (``--fit``).
        held: Bytes that servers hold which give way to the new one.

    Raises:
        EngineError: with the way out. Where it isn't known what a context takes,
            nothing is refused: what a user's own arguments change isn't.
    """
    import psutil  # type: ignore[import-untyped]

    told = options.context is not None or options.arguments
    if told or not all(file.caches_all for file in files):
        return
    tokens = options.concurrency * files[0].number("context_length")
    needed = OTHER_BYTES + sum(file.cache_bytes(tokens) for file in files)
    if fits:
        weights = sum(file.size for file in files)
        machine = psutil.virtual_memory().total  # llama.cpp sees no container's limit
        needed = min(needed, machine - weights - FIT_LEAVES)
    usable = usable_memory() + held
    if needed > usable:
        raise EngineError(
            f"llama.cpp: {_longest(options, files[0])}, take a server of "
            f"{needed / GIB:.1f} GiB beside the weights, and {usable / GIB:.1f} GiB "
            "may be used; tell the longest prompt with its answer by --context"
        )


def _longest(options: EngineOptions, model: GgufFile) -> str:
    longest = model.number("context_length")
    return f"{options.concurrency} x {longest} tokens, the longest that the model knows"
