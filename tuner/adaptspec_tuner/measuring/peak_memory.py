"""The most memory that a piece of work took."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes at the highest since :meth:`reset`: on CUDA the allocator's, on a CPU the
    process's resident memory.

    Linux counts the peak itself (proc(5): ``VmHWM``, reset through ``clear_refs``).
    Where it can't be reset nothing is known.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = device.type == "cuda"

    def reset(self) -> None:
        """Count from here."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            _CLEAR.write_text("5")
            self._known = True
        except OSError:
            self._known = False

    def bytes(self) -> int:
        """The peak; 0 where it isn't known."""
        if not self._known:
            return 0
        if self._device.type == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self._device))
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0


def weights_of(modules: Iterable[nn.Module]) -> dict[int, int]:
    """The weights in memory: something that tells each apart -> its bytes.

    What several modules share is there once, as it is in memory.
    """
    from adaptspec.acceleration.packed import PackedEmbedding, PackedLinear

    found: dict[int, int] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            # Views of a caller's model share its tensors.
            found[id(tensor)] = tensor.nbytes
        for layer in module.modules():
            if not isinstance(layer, PackedLinear | PackedEmbedding):
                continue
            if layer.packed is not None:
                found[id(layer.packed)] = layer.packed.nbytes
    return found
