"""A GPU that is only pretended, to run code for one where there is none.

Everything is computed on the CPU. Tensors that belong on the GPU are marked, and say so
when they are asked for their device; an operation that takes some of both kinds raises,
as it would on a real one. What the host reads of the GPU is counted. A captured graph
is a list of operations that is run again over the same tensors, so that what Python
decided while it was captured stays decided.

It finds mixed devices, reads in a capture, and state that a graph doesn't see. It says
nothing of a GPU's kernels, their rounding, or time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CUDA = torch.device("cuda", 0)
Module = TypeVar("Module", bound=nn.Module)

_MARK = "adaptspec_pretended"
_aten = torch.ops.aten
# They take indices from the host.
_INDEXING = (
    *(_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default),
    _aten._index_put_impl_.default,
)
_COPYING = (_aten.copy_.default, _aten._copy_from.default)
# What comes out depends on values, so the host waits for them. In inference mode those
# that are made of others come as they are.
_WAITING = (
    *(_aten._local_scalar_dense.default, _aten.item.default, _aten.equal.default),
    *(_aten.is_nonzero.default, _aten.nonzero.default, _aten.nonzero_numpy.default),
    *(_aten.argwhere.default, _aten.allclose.default, _aten.one_hot.default),
    *(_aten.masked_select.default, _aten._unique2.default),
    *(_aten.unique_consecutive.default, _aten.unique_dim.default),
    _aten.repeat_interleave.Tensor,
)


class MixedDevicesError(RuntimeError):
    """An operation takes tensors of the GPU and of the host."""


class CaptureError(RuntimeError):
    """A captured computation waits for the GPU."""


def pretended(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the pretended GPU."""
    return bool(getattr(tensor, _MARK, False))


def _mark(tensor: torch.Tensor, there: bool) -> torch.Tensor:
    setattr(tensor, _MARK, there)
    return tensor


class PretendedCuda:
    """Inside ``with``, tensors made with ``device="cuda"`` are on a pretended GPU.

    Attributes:
        reads: Times that the host read values of the GPU, or waited for them.
        captures: Graphs that were captured.
        replays: Times that one was replayed.
    """

    def __init__(self) -> None:
        self.reads = self.captures = self.replays = 0
        self._operations: list[Any] | None = None  # of a capture under way
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PretendedCuda:
        """Begin to pretend."""
        self._stack.enter_context(mock.patch.multiple(torch.cuda, **self._interface()))
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *error: object) -> None:
        """Stop it."""
        self._stack.close()

    def put(self, module: Module) -> Module:
        """Move a module's parameters and buffers there."""
        for tensor in (*module.parameters(), *module.buffers()):
            _mark(tensor, True)
        return module

    @contextlib.contextmanager
    def counted(self) -> Iterator[Callable[[], int]]:
        """Inside, what is given says how often the host has read since."""
        before = self.reads
        yield lambda: self.reads - before

    def read(self, what: str) -> None:
        """Count one.

        Raises:
            CaptureError: while a graph is captured.
        """
        if self._operations is not None:
            raise CaptureError(f"{what} waits for the device in a capture")
        self.reads += 1

    def operation(
        self, function: Any, arguments: Sequence[Any], named: dict[str, Any]
    ) -> Any:
        """Run one where its tensors are.

        Raises:
            MixedDevicesError: if they are in two places.
            CaptureError: if it waits for values in a capture.
        """
        tensors = _tensors((arguments, named))
        there = [tensor for tensor in tensors if pretended(tensor)]
        here = [tensor for tensor in tensors if not pretended(tensor)]
        copied = function in _COPYING
        if there and here and not copied and not _may_mix(function, arguments, here):
            raise MixedDevicesError(
                f"{function} takes tensors on cuda:0 {_shapes(there)} and on cpu "
                f"{_shapes(here)}"
            )
        if there and function in _WAITING:
            self.read(str(function))
        if copied and there and here:
            self._transfer(str(function), pretended(arguments[0]))
        result = function(*arguments, **named)
        if there and not copied:
            for tensor in _tensors(result):
                _mark(tensor, True)
        if self._operations is not None:
            self._operations.append((function, arguments, named, result))
        return result

    def _transfer(self, what: str, to_device: bool) -> None:
        if not to_device:
            self.read(what)
        elif self._operations is not None:
            raise CaptureError(f"{what} takes memory of the host into a capture")

    def moved(self, tensor: torch.Tensor, moved: torch.Tensor, there: bool) -> Any:
        """What ``to`` gives: ``moved`` is ``tensor`` in the type that was asked for."""
        if pretended(tensor) == there:
            return _mark(moved, there)
        self._transfer("to", there)
        return _mark(moved.clone() if moved is tensor else moved, there)

    def _interface(self) -> dict[str, Any]:
        """In place of ``torch.cuda``'s."""

        def nothing(*arguments: Any, **named: Any) -> Any:
            return contextlib.nullcontext()

        def synchronize(*arguments: Any) -> None:
            if self._operations is not None:
                raise CaptureError("synchronize waits for the device in a capture")

        def stream(*arguments: Any, **named: Any) -> Any:
            return SimpleNamespace(wait_stream=nothing, synchronize=synchronize)

        def event(*arguments: Any, **named: Any) -> Any:
            return SimpleNamespace(record=nothing, synchronize=synchronize)

        @contextlib.contextmanager
        def graph(into: _Graph, **named: Any) -> Iterator[None]:
            self._operations = []
            try:
                yield
                into.operations = self._operations
                self.captures += 1
            finally:
                self._operations = None

        return {
            "synchronize": synchronize,
            "current_stream": stream,
            "Stream": stream,
            "stream": nothing,
            "device": nothing,
            "Event": event,
            "graph": graph,
            "CUDAGraph": lambda: _Graph(self),
            "graph_pool_handle": lambda: object(),
            "get_device_name": lambda *_: "pretended",
        }


class _Graph:
    """Operations that were captured."""

    def __init__(self, cuda: PretendedCuda) -> None:
        self._cuda = cuda
        self.operations: list[Any] = []

    def replay(self) -> None:
        """Run them again, into the tensors that they gave then."""
        self._cuda.replays += 1
        for function, arguments, named, result in self.operations:
            again = function(*arguments, **named)
            memory = {_memory(one) for one in _tensors((arguments, named))}
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if _memory(old) not in memory:  # neither a view nor written in place
                    old.copy_(new)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, cuda: PretendedCuda) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cuda = cuda

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self._cuda.operation(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What names a device, or is asked for one."""

    def __init__(self, cuda: PretendedCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and name in ("__get__", "__set__"):
            return self._attribute(func, name, first, args)
        if first is not None and pretended(first):
            if name in ("numpy", "__array__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if name == "get_device":
                return CUDA.index
            if name == "tolist":
                self._cuda.read("tolist")
        if named.pop("pin_memory", False) or name == "pin_memory":
            return first if name == "pin_memory" else func(*args, **named)
        if first is not None and name in ("to", "cuda", "cpu"):
            return self._moved(func, name, first, args, named)
        device = named.get("device")
        if device is None:
            return func(*args, **named)
        there = torch.device(device).type == "cuda"
        named["device"] = "cpu"
        if first is not None and not name.startswith("new_"):  # zeros_like and others
            pretended_then = pretended(first)
            made = func(*args, **named)
            return self._cuda.moved(first, made, there) if pretended_then else made
        return _mark(func(*args, **named), there)

    def _attribute(
        self, func: Any, name: str, first: torch.Tensor, args: Sequence[Any]
    ) -> Any:
        of = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__set__":
            func(*args)
            if of == "data" and isinstance(args[1], torch.Tensor):
                _mark(first, pretended(args[1]))
            return None
        if pretended(first):
            known = {"device": CUDA, "is_cuda": True, "is_cpu": False}
            if of in known:
                return known[of]
        return func(*args)

    def _moved(
        self,
        func: Any,
        name: str,
        first: torch.Tensor,
        args: Sequence[Any],
        named: dict[str, Any],
    ) -> Any:
        """``to``, in each of its forms."""
        if name in ("cuda", "cpu"):
            return self._cuda.moved(first, first, name == "cuda")
        place: torch.device | None = None
        given: list[Any] = []
        for value in args[1:]:
            if isinstance(value, torch.Tensor):
                place = CUDA if pretended(value) else torch.device("cpu")
                given.append(value.dtype)
            elif isinstance(value, str | int | torch.device) and not isinstance(
                value, bool
            ):
                place = torch.device(value)
            else:
                given.append(value)
        if named.get("device") is not None:
            place = torch.device(named["device"])
        named.pop("device", None)
        given = [value for value in given if isinstance(value, torch.dtype)]
        dtype = named.get("dtype") or (given[0] if given else first.dtype)
        changed = torch.Tensor.to(first, dtype, copy=bool(named.get("copy")))
        there = pretended(first) if place is None else place.type == "cuda"
        return self._cuda.moved(first, changed, there)


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _tensors(of: Any) -> list[torch.Tensor]:
    return [one for one in tree_flatten(of)[0] if isinstance(one, torch.Tensor)]


def _may_mix(function: Any, arguments: Sequence[Any], here: list[torch.Tensor]) -> bool:
    """Whether a real GPU would take these: single numbers, and indices."""
    if function in _INDEXING:
        return pretended(arguments[0])
    single = all(tensor.dim() == 0 for tensor in here)
    return single and torch.Tag.pointwise in function.tags


def _shapes(tensors: list[torch.Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
