"""A decoder layer as one call of our kernel, for the few rows of a step.

Between the products of a layer stand some forty operations on a few numbers. What they
cost is mostly Python's and torch's bookkeeping, of which nothing is left here.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptspec.acceleration.attention import MOST_ROWS, sight_of
from adaptspec.acceleration.linear import NativeLinear
from adaptspec.acceleration.native import Kernel, is_plain
from adaptspec.acceleration.packed import PackedLinear, PackedWeight
from adaptspec.model.cache import TreeCache, TreeLayer

# What a layer may be told that changes nothing of what it computes.
IDLE_ARGUMENTS = frozenset(
    ("position_ids", "cache_position", "use_cache", "output_hidden_states")
)
INNER = ("query", "key")  # norms of single heads
CACHE_NAMES = ("cache", "past_key_values")

_ROOMS = threading.local()
Linear = PackedLinear | NativeLinear
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class _Product(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("outer", _LONG))


class _Norm(ctypes.Structure):
    _fields_ = (
        ("weight", _POINTER),
        ("epsilon", ctypes.c_float),
        ("offset", ctypes.c_float),
        ("early", _INT),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("hidden", "heads", "groups", "head", "inner")),
        ("before_attention", _Norm),
        ("after_attention", _Norm),
        ("before_mlp", _Norm),
        ("after_mlp", _Norm),
        ("query", _Norm),
        ("key", _Norm),
        ("into", _Product * 3),
        ("out", _Product),
        ("gate_up", _Product * 2),
        ("down", _Product),
        ("scale", ctypes.c_float),
        ("activation", _INT),
        ("up_first", _INT),
        ("plain", _INT),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("x", "y", "cos", "sin", "keys", "values")),
        *((name, _POINTER) for name in ("seen", "counts", "room")),
        *((name, _LONG) for name in ("rows", "turned", "cached")),
        *((name, _LONG) for name in ("key_head", "value_head")),
        ("threads", _INT),
    )


@dataclass(frozen=True)
class Norm:
    """A module that divides by the root mean square.

    Args:
        module: Has a ``weight``.
        epsilon: Added to the mean square.
        offset: Added to the weight.
        early: Whether it rounds to its type before it multiplies by the weight.
    """

    module: nn.Module
    epsilon: float
    offset: float
    early: bool


@dataclass(frozen=True)
class Norms:
    """Where a layer normalises; None: it doesn't there."""

    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    query: Norm | None = None
    key: Norm | None = None


@dataclass(frozen=True)
class Recipe:
    """What a layer computes, as ``layer.c`` says it.

    Args:
        into: To queries, keys and values, side by side.
        gate_up: To gate and up (or up and gate), side by side.
        heads: Of queries.
        groups: Heads of keys and values.
        head: Numbers in each.
        scale: Of the products of queries and keys.
        index: The layer's in the cache.
        turned: Whether positions turn queries and keys.
        activation: 0 for SiLU, 1 for GELU by its tanh formula.
    """

    into: tuple[Linear, ...]
    out: Linear
    gate_up: tuple[Linear, ...]
    down: Linear
    norms: Norms
    heads: int
    groups: int
    head: int
    scale: float
    index: int
    turned: bool
    activation: int
    up_first: bool

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All of them."""
        return (*self.into, self.out, *self.gate_up, self.down)

    def fits(self, step: int) -> bool:
        """Whether sizes fit together, those that are summed over being multiples of
        ``step``."""
        hidden, inner = self.down.out_features, self.down.in_features
        wide = self.heads * self.head
        outer = sum(linear.out_features for linear in self.into)
        return (
            outer == wide + 2 * self.groups * self.head
            and (self.out.in_features, self.out.out_features) == (wide, hidden)
            and sum(linear.out_features for linear in self.gate_up) == 2 * inner
            and all(x.in_features == hidden for x in (*self.into, *self.gate_up))
            and not (hidden % step or inner % step or wide % step)
            and all(
                len(norm.module.weight) == (self.head if name in INNER else hidden)
                for name in Norms.__dataclass_fields__
                if (norm := getattr(self.norms, name)) is not None
            )
        )


class WholeLayer:
    """A layer's modules as one operation, as long as they are what they were.

    Args:
        layer: The module whose ``forward`` this stands for.
        recipe: What it computes.

    Raises:
        ValueError: if some weights are packed and others aren't.
    """

    def __init__(self, layer: nn.Module, recipe: Recipe, kernel: Kernel) -> None:
        self.recipe = recipe
        self._watched: list[tuple[dict[str, Any], str, Any]] = []
        self._places: list[tuple[torch.Tensor, int]] = []
        self._hooks: list[dict[int, Any]] = []
        for module in layer.modules():
            self._watch(module, inner=module is not layer)
        self._packed = [
            packed for x in recipe.linears if (packed := packed_of(x)) is not None
        ]
        if len(self._packed) not in (0, len(recipe.linears)):
            raise ValueError("all weights must be packed, or none")
        plain = not self._packed
        self.dtype = recipe.down.weight.dtype if plain else self._packed[0].dtype
        if not recipe.fits(kernel.step(self.dtype, plain)):
            raise ValueError("sizes of weights don't fit together")
        self._hidden = recipe.down.out_features
        self._native = _Layer(
            hidden=self._hidden,
            heads=recipe.heads,
            groups=recipe.groups,
            head=recipe.head,
            inner=recipe.down.in_features,
            **{
                name: self._norm(getattr(recipe.norms, name))
                for name in Norms.__dataclass_fields__
            },
            into=(_Product * 3)(*map(self._product, recipe.into)),
            out=self._product(recipe.out),
            gate_up=(_Product * 2)(*map(self._product, recipe.gate_up)),
            down=self._product(recipe.down),
            scale=recipe.scale,
            activation=recipe.activation,
            up_first=recipe.up_first,
            plain=plain,
        )
        self._run, self._room_for, self._queries = kernel.layers[self.dtype]
        self._kernel = kernel
        self._sizes: dict[int, int] = {}  # of the room for so many rows

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the layer runs its modules."""

    def __call__(
        self, arguments: Sequence[Any], named: dict[str, Any]
    ) -> torch.Tensor | None:
        """What the layer gives for these arguments, and its rows in the cache.

        None where that is for the modules to say, and nothing has happened.
        """
        if len(arguments) != 1:
            return None
        x: torch.Tensor = arguments[0]
        mask = turns = cache = None
        for name, value in named.items():
            if name == "attention_mask":
                mask = value
            elif name == "position_embeddings":
                turns = value
            elif name in CACHE_NAMES:
                cache = value if cache is None else cache
            elif (
                name not in IDLE_ARGUMENTS and value is not None and value is not False
            ):
                return None
        # Held until the call is over: the kernel reads them by their addresses.
        weights = [packed.held for packed in self._packed]
        if (
            type(cache) is not TreeCache
            or any(weight is None for weight in weights)
            or not self._reads(x)
            or not self._intact()
        ):
            return None
        rows = x.shape[1]
        recipe = self.recipe
        cos = sin = None
        turned = 0
        if recipe.turned:
            if type(turns) is not tuple or len(turns) != 2:
                return None
            cos, sin = turns
            turned = cos.shape[-1]
            if not (self._turns(cos, rows, turned) and self._turns(sin, rows, turned)):
                return None
        kept = cache.rows[recipe.index]
        cached = kept.length
        if mask is None and rows > 1:
            return None
        sight = sight_of(self._kernel, mask, rows, cached + rows)
        if sight is None or not self._keeps(kept):
            return None
        keys, values = kept.reserve(rows)
        seen = sight.seen
        room = self._room(rows)
        y = torch.empty_like(x)
        self._run(
            ctypes.byref(self._native),
            ctypes.byref(
                _Call(
                    x.data_ptr(),
                    y.data_ptr(),
                    None if cos is None else cos.data_ptr(),
                    None if sin is None else sin.data_ptr(),
                    keys.data_ptr(),
                    values.data_ptr(),
                    None if seen is None else seen.keys.data_ptr(),
                    None if seen is None else seen.counts.data_ptr(),
                    room.data_ptr(),
                    rows,
                    turned,
                    cached,
                    keys.stride(1),
                    values.stride(1),
                    torch.get_num_threads(),
                )
            ),
        )
        kept.length = cached + rows
        return y

    def queries(self, rows: int) -> torch.Tensor:
        """Those of this thread's last call, of ``rows``: ``[heads, rows, d]``."""
        shape = (rows, self.recipe.heads, self.recipe.head)
        found = torch.empty(shape, dtype=torch.float32, device="cpu")
        self._queries(
            ctypes.byref(self._native),
            rows,
            self._room(rows).data_ptr(),
            found.data_ptr(),
        )
        return found.transpose(0, 1)

    def _room(self, rows: int) -> torch.Tensor:
        """Memory of this thread, for one call of ``rows``."""
        if (size := self._sizes.get(rows)) is None:
            size = self._room_for(ctypes.byref(self._native), rows)
            self._sizes[rows] = size
        room: torch.Tensor | None = getattr(_ROOMS, "room", None)
        if room is None or len(room) < size:
            room = torch.empty(size, dtype=torch.uint8, device="cpu")
            _ROOMS.room = room
        return room

    def _watch(self, module: nn.Module, inner: bool) -> None:
        """See later whether it was changed by then."""
        own = module.__dict__
        for name, child in module._modules.items():
            self._watched.append((module._modules, name, child))
        for name, parameter in module._parameters.items():
            self._watched.append((module._parameters, name, parameter))
            if parameter is not None:
                self._places.append((parameter, parameter.data_ptr()))
        if inner:
            self._watched.append((own, "forward", own.get("forward")))
            self._hooks += [module._forward_pre_hooks, module._forward_hooks]

    def _intact(self) -> bool:
        """Whether calling the modules would still do what the recipe says."""
        for holder, name, expected in self._watched:
            if holder.get(name) is not expected:
                return False
        for tensor, place in self._places:
            if tensor.data_ptr() != place:
                return False
        everywhere = nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return False
        return not any(self._hooks) or not any(map(acts, hooks_of(self._hooks)))

    def _reads(self, x: Any) -> bool:
        return (
            type(x) is torch.Tensor
            and x.dtype is self.dtype
            and x.dim() == 3
            and x.shape[0] == 1
            and 0 < x.shape[1] <= MOST_ROWS
            and x.shape[2] == self._hidden
            and is_plain(x)
            and x.is_contiguous()
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )

    def _turns(self, x: torch.Tensor, rows: int, turned: int) -> bool:
        return (
            x.dtype is self.dtype
            and x.shape == (1, rows, turned)
            and turned % 2 == 0
            and turned <= self.recipe.head
            and is_plain(x)
            and x.is_contiguous()
        )

    def _keeps(self, kept: TreeLayer) -> bool:
        if not kept.is_initialized:
            return False
        wanted = (1, self.recipe.groups, self.recipe.head)
        for buffer in (kept.keys, kept.values):
            assert buffer is not None
            shape = buffer.shape
            if (
                (shape[0], shape[1], shape[3]) != wanted
                or buffer.dtype is not self.dtype
                or not is_plain(buffer)
            ):
                return False
        return True

    def _norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm()
        weight = norm.module.weight
        assert isinstance(weight, torch.Tensor)
        return _Norm(weight.data_ptr(), norm.epsilon, norm.offset, norm.early)

    def _product(self, linear: Linear) -> _Product:
        packed = packed_of(linear)
        weight = linear.weight if packed is None else packed.held
        assert weight is not None
        bias = None if linear.bias is None else linear.bias.data_ptr()
        return _Product(weight.data_ptr(), bias, linear.out_features)


def packed_of(linear: Linear) -> PackedWeight | None:
    """The packed weight that a layer reads; None for a plain one."""
    return linear.packed if isinstance(linear, PackedLinear) else None


def hooks_of(holders: Sequence[dict[int, Any]]) -> Iterator[Any]:
    """All hooks that are held."""
    for holder in holders:
        yield from holder.values()


def acts(hook: Any) -> bool:
    """Whether it could see or change something; transformers' own only notes what
    attention weighs, which our attention doesn't say."""
    return getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
