"""Memory of a cached token, and how much memory is free."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from adaptspec.memory import usable_memory

if TYPE_CHECKING:
    import torch

    from adaptspec.model.language_model import LanguageModel

_ROWS: WeakKeyDictionary[LanguageModel, int] = WeakKeyDictionary()


def bytes_of_row(model: LanguageModel) -> int:
    """Bytes that a cached token takes in all layers; read off a cache of one token."""
    if model not in _ROWS:
        cache = model.new_cache(1)
        model.prefill([0], cache)
        _ROWS[model] = sum(
            buffer.nbytes // max(1, buffer.shape[2])
            for layer in cache.rows
            for buffer in (layer.keys, layer.values)
            if buffer is not None
        )
    return _ROWS[model]


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be allocated there."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + kept)
    return usable_memory()
