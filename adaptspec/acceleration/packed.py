"""Linear layers and embeddings whose weights are packed as our kernel reads them.

A decoding step multiplies few rows by every weight, so it is bound by reading weights.
Packed, each thread reads one contiguous stream in large pages, and eight rows cost what
one does where the processor has the arithmetic (see ``packed.c``).
"""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

import torch
from torch import nn

from adaptspec.acceleration.native import Kernel, is_plain, multiply_plain

LARGE_PAGE_BYTES = 1 << 21
SLAB_BYTES = 1 << 26


class Slabs:
    """Room for packed weights, in large pages where the system gives them.

    Small weights share a slab, which is freed with the last of them. A page that isn't
    written to takes no memory.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._slab: torch.Tensor | None = None
        self._used = 0

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised vector of ``count`` elements."""
        size = -(-count * dtype.itemsize // 64) * 64  # whole cache lines
        if self._slab is None or self._used + size > len(self._slab):
            room = max(size, SLAB_BYTES) + LARGE_PAGE_BYTES
            whole = torch.empty(room, dtype=torch.uint8, device="cpu")
            first = -whole.data_ptr() % LARGE_PAGE_BYTES
            self._slab, self._used = whole[first : first + max(size, SLAB_BYTES)], 0
            self._kernel.large_pages(self._slab)
        found = self._slab[self._used :][: count * dtype.itemsize]
        self._used += size
        return found.view(dtype)


class PackedWeight:
    """A weight ``[out, in]`` of float32 or bfloat16, held by the layers that share it.

    Whoever reads a layer's ``weight`` gets it, and all of them are ordinary layers from
    then on: no weight is held twice, and what is written to it counts.
    """

    def __init__(self, weight: torch.Tensor, kernel: Kernel, slabs: Slabs) -> None:
        self.shape, self.dtype = (weight.shape[0], weight.shape[1]), weight.dtype
        self.trained, self.kernel = weight.requires_grad, kernel
        self._unpacking = threading.Lock()
        plain = weight.detach()
        room = slabs.take(kernel.packed_size(plain), plain.dtype)
        self._packed: torch.Tensor | None = kernel.pack(plain, room)
        self._layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes in memory, 0 once it is unpacked."""
        return 0 if self._packed is None else self._packed.nbytes

    @property
    def held(self) -> torch.Tensor | None:
        """The packed elements; None once it is unpacked."""
        return self._packed

    def share(self, layer: nn.Module) -> None:
        """Count ``layer`` among those that hold it."""
        self._layers.add(layer)

    def product(
        self, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """``x [..., in] -> [..., out]``; the bits of a row depend on that row alone.

        None where it is unpacked by now.
        """
        if (held := self._packed) is None:
            return None
        outer, inner = self.shape
        if not x.numel() and x.shape[-1] == inner:
            return x.new_empty((*x.shape[:-1], outer))
        flat = x.reshape(-1, inner).contiguous()
        y = self.kernel.packed_linear(flat, held, outer, bias)
        return y.view(*x.shape[:-1], outer)

    def rows(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Rows of the weight, ``[...] -> [..., in]``; None where it is unpacked."""
        if (held := self._packed) is None:
            return None
        found = self.kernel.unpack(held, self.shape, ids.reshape(-1))
        return found.view(*ids.shape, self.shape[1])

    def plain(self) -> nn.Parameter | None:
        """A plain copy of the weight; None where it is unpacked."""
        if (held := self._packed) is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            return nn.Parameter(self.kernel.unpack(held, self.shape), self.trained)

    def unpack(self) -> None:
        """Make the layers that hold it ordinary ones; once is enough."""
        with self._unpacking:
            if (weight := self.plain()) is None:
                return
            for layer in self._layers:
                layer._parameters["weight"] = weight
                layer.__dict__["packed"] = None
            self._packed = None


class _Packed(nn.Module):
    """What layers that hold a packed weight have in common."""

    packed: PackedWeight | None

    def _hold(self, packed: PackedWeight) -> None:
        self.packed = packed
        packed.share(self)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.unpack()
        return super().__getattr__(name)

    def unpack(self) -> None:
        """Be an ordinary layer again."""
        if (packed := self.__dict__.get("packed")) is not None:
            packed.unpack()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.unpack()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """An ordinary layer; this one stays packed."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        nn.Module.__init__(twin)
        state = dict(self.__dict__)
        packed = state.pop("packed")
        twin.__dict__.update(copy.deepcopy(state, memo))
        twin.__dict__["packed"] = None
        if packed is not None:
            if id(packed) not in memo:
                memo[id(packed)] = packed.plain()
            twin._parameters["weight"] = memo[id(packed)]
        return twin


class PackedLinear(_Packed, nn.Linear):
    """A Linear layer that reads a packed weight.

    Args:
        most_rows: Once it is unpacked, up to how many rows our kernel multiplies.
    """

    def __init__(self, linear: nn.Linear, packed: PackedWeight, most_rows: int) -> None:
        nn.Module.__init__(self)  # a Linear's own would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._kernel, self._most_rows = packed.kernel, most_rows
        self._hold(packed)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``."""
        if (packed := self.packed) is not None:
            if not _readable(input, packed, self.bias):
                self.unpack()
            elif (found := packed.product(input, self.bias)) is not None:
                return found
        return multiply_plain(
            self._kernel, input, self.weight, self.bias, self._most_rows
        )


class PackedEmbedding(_Packed, nn.Embedding):
    """An Embedding whose rows are those of a packed weight."""

    def __init__(self, embedding: nn.Embedding, packed: PackedWeight) -> None:
        nn.Module.__init__(self)
        for name in nn.Embedding.__constants__:
            setattr(self, name, getattr(embedding, name))
        self._hold(packed)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[...] -> [..., embedding_dim]``."""
        if (packed := self.packed) is not None:
            ids = is_plain(input) and input.dtype in (torch.int32, torch.int64)
            if not ids or (torch.is_grad_enabled() and packed.trained):
                self.unpack()
            elif (found := packed.rows(input)) is not None:
                return found
        return super().forward(input)


def _readable(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> bool:
    """Whether the kernel may read ``x``: of the weight's type, without a gradient."""
    given = [x] if bias is None else [x, bias]
    wanted = packed.trained or any(each.requires_grad for each in given)
    return (
        all(each.dtype is packed.dtype and is_plain(each) for each in given)
        and (bias is None or bias.is_contiguous())
        and not (torch.is_grad_enabled() and wanted)
    )
