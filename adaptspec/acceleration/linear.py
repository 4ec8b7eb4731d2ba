"""Faster Linear layers on the CPU, chosen by measurement on this machine.

A decoding step multiplies few rows by every weight, so it is bound by reading weights.
Without bfloat16 instructions oneDNN computes such products many times slower than it
reads; our kernel widens weights in registers instead. With matrix units (AMX) it gives
them the weights as they lie in memory, so that up to sixteen rows cost what one does.
With bfloat16 instructions alone (Zen 4), oneDNN on weights packed once is the fastest.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from adaptspec.acceleration.file_pages import FilePages
from adaptspec.acceleration.native import (
    Kernel,
    NativeUnavailableError,
    is_plain,
    kernel,
)

Kind = Literal["native", "packed", "none"]
Product = Callable[[torch.Tensor, int], object]  # rows, number of the weight

TYPES = (torch.bfloat16, torch.float32)

# Rows at which the choice is made: plain decoding, and a modest verification.
DECIDING_ROWS = (1, 8)
MANY_ROWS = (64, 256)
# Fewer rows are filled up to one of these, if that saves so much of their time.
FEW_ROWS, FEW_SAVES = (4, 6), 0.05
FEW_ROUNDS, FEW_SECONDS = 6, 1.5
FEW_WEIGHTS = 1 << 26  # smaller models are bound by other things
TRIAL_SHAPE = (1536, 4096)  # out, in
TRIAL_COPIES = 6  # enough that weights come from memory, not from cache
TIMED_ROUNDS = 7


@dataclass(frozen=True)
class LinearReport:
    """How many layers were replaced, and by what (in words).

    Args:
        filled: To how many rows fewer are filled up, 1 if they aren't.
    """

    replaced: int
    kind: str
    filled: int = 1


@dataclass(frozen=True)
class ProductChoice:
    """The choice for one type: which product, and up to how many rows."""

    kind: Kind
    most_rows: int
    reason: str


class NativeLinear(nn.Linear):
    """Reads the plain weight, which stays where it was (tied and shared ones too)."""

    def __init__(self, linear: nn.Linear, compiled: Kernel, most_rows: int) -> None:
        nn.Module.__init__(self)  # a Linear's own would allocate a weight
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._kernel, self._most_rows = compiled, most_rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``."""
        weight = self.weight
        rows = x.numel() // self.in_features
        if (
            not 0 < rows <= self._most_rows
            or x.dtype is not weight.dtype
            # The caller may have moved, quantised or released it since.
            or not (is_plain(x) and is_plain(weight) and weight.is_contiguous())
        ):
            return functional.linear(x, weight, self.bias)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return functional.linear(x, weight, self.bias)
        flat = x.reshape(rows, self.in_features).contiguous()
        y = self._kernel.linear(flat, weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class PackedLinear(nn.Linear):
    """Holds the weight in oneDNN's own layout only.

    Whoever reads ``weight`` (modelling code that asks for its type, a state
    dictionary) gets it, and the layer is an ordinary one from then on: no weight is
    held twice, and what is written to it counts.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # a Linear's own would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.dtype = linear.bias, linear.weight.dtype
        self._trained = linear.weight.requires_grad
        self._packed: torch.Tensor | None = pack(linear.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``."""
        packed = self._packed
        if packed is None:
            return functional.linear(x, self.weight, self.bias)
        return packed_linear(x, packed, self.bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.unpack()
        return super().__getattr__(name)

    def unpack(self) -> None:
        """Be an ordinary layer again; once is enough."""
        packed = self.__dict__.get("_packed")
        if packed is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            weight = packed.to_dense().contiguous()
            self._parameters["weight"] = nn.Parameter(weight, self._trained)
        self._packed = None

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.unpack()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        self.unpack()  # a packed tensor has no copy
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        nn.Module.__init__(twin)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def accelerate_linears(module: nn.Module, *, own_weights: bool) -> LinearReport:
    """Replace the Linear layers inside ``module`` by faster ones, outputs unchanged up
    to rounding.

    Args:
        module: A module tree of ours; its parameters may be the caller's.
        own_weights: Whether weights may be repacked, each original being released.
            Otherwise only products that read the weight where it is are considered.
    """
    layers = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and _replaceable(child)
    ]
    if not layers:
        return LinearReport(
            0, "none: no Linear layer of float32 or bfloat16 on the CPU"
        )
    dtype = layers[0][2].weight.dtype
    choice = choose(dtype, own_weights)
    if choice.kind == "none":
        return LinearReport(0, f"none: {choice.reason}")
    uses = Counter(
        id(parameter)
        for owner in module.modules()
        for parameter in owner.parameters(recurse=False)
    )
    files = FilePages()
    replaced = 0
    while layers:
        parent, name, linear = layers.pop()
        if linear.weight.dtype is not dtype:
            continue
        if choice.kind == "native":
            faster: nn.Module = NativeLinear(linear, kernel(), choice.most_rows)
        elif uses[id(linear.weight)] > 1:
            continue  # an embedding needs the plain weight: packing would double it
        else:
            faster = PackedLinear(linear)
            plain = linear.weight.untyped_storage()
            held = weakref.ref(linear.weight)
        setattr(parent, name, faster.eval())
        replaced += 1
        del linear
        if choice.kind == "packed" and held() is None:
            files.give_back(plain)
    short = str(dtype).removeprefix("torch.")
    return LinearReport(replaced, f"{choice.kind} {short}: {choice.reason}")


@torch.inference_mode()
def fill_up(module: nn.Module, report: LinearReport) -> LinearReport:
    """Return ``report`` with the row count to which smaller batches are best padded.

    oneDNN reads packed weights faster for a few rows than for one: its blocks keep more
    reads under way (on Zen 4 four or six rows take 0.8 to 0.9 of one row's time in
    bfloat16). Measured on the very layers, once, in a second or two.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, PackedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    if not layers or weights < FEW_WEIGHTS:
        return report
    dtype = layers[0].dtype
    sizes = {layer.in_features for layer in layers}
    inputs = {
        rows: {size: torch.randn((rows, size)).to(dtype) for size in sizes}
        for rows in (1, *FEW_ROWS)
    }
    times: dict[int, list[float]] = {rows: [] for rows in inputs}
    began = perf_counter()
    for turn in range(FEW_ROUNDS + 1):
        for rows, by_size in inputs.items():
            started = perf_counter()
            for layer in layers:
                layer(by_size[layer.in_features])
            if turn:
                times[rows].append(perf_counter() - started)
        if turn > 1 and perf_counter() - began > FEW_SECONDS:
            break
    seconds = {rows: median(found) for rows, found in times.items()}
    best = min(FEW_ROWS, key=seconds.__getitem__)
    share = seconds[best] / seconds[1]
    told = f"{report.kind}; {best} rows of all layers {share:.2f}x of one"
    return replace(report, kind=told, filled=best if share < 1 - FEW_SAVES else 1)


@functools.cache
def choose(dtype: torch.dtype, own_weights: bool) -> ProductChoice:
    """Measure the products once per process on weights of a usual size.

    The fastest at one and at eight rows together wins; a few hundred milliseconds.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(TRIAL_SHAPE, generator=generator).to(dtype)
        for _ in range(TRIAL_COPIES)
    ]
    candidates, remark = _products(weights, own_weights)
    seconds = {rows: _race(candidates, rows, dtype) for rows in DECIDING_ROWS}
    plain = seconds[1]["none"]

    def cost(kind: str) -> float:
        return sum(
            seconds[rows][kind] / seconds[rows]["none"] for rows in DECIDING_ROWS
        )

    best = min(candidates, key=cost)
    reason = ", ".join(
        f"{rows} rows {seconds[rows][best] / plain:.2f}x" for rows in DECIDING_ROWS
    )
    if best == "native":
        reach = _reach(weights)
        return ProductChoice("native", reach, f"{reason} of torch's one row{remark}")
    if best == "packed":
        return ProductChoice("packed", 1 << 30, f"{reason} of torch's one row{remark}")
    return ProductChoice("none", 0, f"torch's own product is the fastest here{remark}")


def _products(
    weights: Sequence[torch.Tensor], packing: bool
) -> tuple[dict[str, Product], str]:
    """The products there are here, by kind, and why others aren't."""
    products: dict[str, Product] = {
        "none": lambda x, i: functional.linear(x, weights[i])
    }
    remark = ""
    try:
        compiled = kernel()
        products["native"] = lambda x, i: compiled.linear(x, weights[i], None)
    except NativeUnavailableError as error:
        remark = f"; no native kernel: {error}"
    if packing:
        try:
            packed = [pack(weight) for weight in weights]
            products["packed"] = lambda x, i: packed_linear(x, packed[i], None)
        except (AttributeError, RuntimeError) as error:
            remark += f"; no packing: {str(error).splitlines()[0]}"
    return products, remark


def pack(weight: torch.Tensor) -> torch.Tensor:
    """``weight [out, in]`` in oneDNN's layout for few rows."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    return packed


def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The product with a packed weight."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x, packed, bias, "none", [], ""
    )
    return y


def _replaceable(child: nn.Linear) -> bool:
    """Whether calling it is one product with a plain weight, and nothing else."""
    if type(child) is not nn.Linear or "forward" in child.__dict__:
        return False
    if child._forward_hooks or child._forward_pre_hooks:
        return False
    weight, bias = child._parameters.get("weight"), child._parameters.get("bias")
    return (
        weight is not None
        and weight.dtype in TYPES
        and _readable(weight, (child.out_features, child.in_features))
        and (child.bias is bias)
        and (
            bias is None
            or (bias.dtype is weight.dtype and _readable(bias, (child.out_features,)))
        )
    )


def _readable(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether all elements lie where a kernel looks for them."""
    return (
        is_plain(tensor)
        and tuple(tensor.shape) == shape
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes()
        >= (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    )


@torch.inference_mode()
def _race(
    candidates: Mapping[str, Product],
    rows: int,
    dtype: torch.dtype,
    inner: int = TRIAL_SHAPE[1],
) -> dict[str, float]:
    """Least seconds of each over all weights, interleaved.

    Other programs only ever add time, and seldom to every round.
    """
    x = torch.randn((rows, inner)).to(dtype)
    times: dict[str, list[float]] = {kind: [] for kind in candidates}
    for turn in range(TIMED_ROUNDS + 1):
        for kind, product in candidates.items():
            started = perf_counter()
            for i in range(TRIAL_COPIES):
                product(x, i)
            if turn:
                times[kind].append(perf_counter() - started)
    return {kind: min(found) for kind, found in times.items()}


def _reach(weights: Sequence[torch.Tensor]) -> int:
    """Up to how many rows the native product beats torch's, on high weights and wide.

    Torch's time for many rows depends much on which of the two they are.
    """
    pairs = {
        inner: _products([weight.view(-1, inner) for weight in weights], False)[0]
        for inner in reversed(TRIAL_SHAPE)
    }
    reach = 32
    for rows in MANY_ROWS:
        raced = [
            _race(pair, rows, weights[0].dtype, inner) for inner, pair in pairs.items()
        ]
        if sum(r["native"] for r in raced) > sum(r["none"] for r in raced):
            return reach
        reach = rows
    return 1 << 30
