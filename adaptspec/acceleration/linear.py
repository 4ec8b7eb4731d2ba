"""Faster Linear layers on the CPU, chosen by what the processor can do.

A decoding step multiplies few rows by every weight, so it is bound by reading weights.
Weights of ours are packed for our kernel (``packed.py``). A caller's weights are read
where they lie; so are all weights of bfloat16 where there are matrix units (AMX).
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from adaptspec.acceleration.file_pages import FilePages
from adaptspec.acceleration.native import (
    LINEAR_TYPES,
    Kernel,
    NativeUnavailableError,
    is_plain,
    kernel,
    multiply_plain,
)
from adaptspec.acceleration.packed import (
    PackedEmbedding,
    PackedLinear,
    PackedWeight,
    Slabs,
)

Kind = Literal["native", "packed", "none"]

# More rows than a step verifies: torch's product then reads a weight where it lies at
# least as fast, unless it has no instructions for the type.
MOST_VERIFIED_ROWS = 64


@dataclass(frozen=True)
class LinearReport:
    """How many layers were replaced, and by what (in words)."""

    replaced: int
    kind: str


@dataclass(frozen=True)
class ProductChoice:
    """The product for one type, up to how many rows of a plain weight, and why.

    A packed weight serves any number; it may be read plainly again.
    """

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

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``."""
        return multiply_plain(
            self._kernel, input, self.weight, self.bias, self._most_rows
        )


@dataclass(frozen=True)
class _Place:
    """A layer and where it hangs; it may hang in several places."""

    parent: nn.Module
    name: str
    layer: nn.Linear | nn.Embedding


def accelerate_linears(module: nn.Module, *, own_weights: bool) -> LinearReport:
    """Replace the Linear layers inside ``module`` by faster ones, outputs unchanged up
    to rounding.

    Args:
        module: A module tree of ours; its parameters may be the caller's.
        own_weights: Whether weights may be repacked, each original being released.
            Otherwise each is read where it is.
    """
    by_weight = _places(module)
    if not by_weight:
        return LinearReport(
            0, "none: no Linear layer of float32 or bfloat16 on the CPU"
        )
    elements: Counter[torch.dtype] = Counter()
    for places in by_weight.values():
        elements[places[0].layer.weight.dtype] += places[0].layer.weight.numel()
    dtype = elements.most_common(1)[0][0]
    choice = choose(dtype, own_weights)
    if choice.kind == "none":
        return LinearReport(0, f"none: {choice.reason}")
    compiled = kernel()
    slabs, files = Slabs(compiled), FilePages()
    uses = Counter(
        id(parameter)
        for owner in module.modules()
        for parameter in owner.parameters(recurse=False)
    )
    replaced = 0
    while by_weight:
        key, places = by_weight.popitem()
        layers = {id(place.layer): place.layer for place in places}
        first = next(iter(layers.values()))
        if first.weight.dtype is not dtype:
            continue
        # What something else reads, too, stays plain: packing would double it.
        packing = choice.kind == "packed" and len(layers) == uses[key]
        faster: dict[int, nn.Module] = {}
        if packing:
            packed = PackedWeight(first.weight, compiled, slabs)
            plain = first.weight.untyped_storage()
            held = weakref.ref(first.weight)
        for number, layer in layers.items():
            if isinstance(layer, nn.Linear):
                replaced += 1
                faster[number] = (
                    PackedLinear(layer, packed, choice.most_rows)
                    if packing
                    else NativeLinear(layer, compiled, choice.most_rows)
                )
            elif packing:
                faster[number] = PackedEmbedding(layer, packed)
        for place in places:
            if (new := faster.get(id(place.layer))) is not None:
                setattr(place.parent, place.name, new.eval())
        del places, layers, first, layer, place
        if packing and held() is None:
            files.give_back(plain)
    short = str(dtype).removeprefix("torch.")
    return LinearReport(replaced, f"{choice.kind} {short}: {choice.reason}")


def choose(dtype: torch.dtype, own_weights: bool) -> ProductChoice:
    """The product for weights of ``dtype``, by what the processor can do.

    The same machine chooses the same every time.

    Args:
        own_weights: Whether they may be packed.
    """
    try:
        compiled = kernel()
    except NativeUnavailableError as error:
        return ProductChoice("none", 0, f"no native kernel: {error}")
    if dtype is torch.bfloat16 and compiled.tiles:
        return ProductChoice(
            "native", MOST_VERIFIED_ROWS, "matrix units (AMX) take weights as they lie"
        )
    paired = dtype is torch.bfloat16 and compiled.pairs
    # Without instructions for bfloat16 torch's product is slow for many rows, too.
    emulated = dtype is torch.bfloat16 and not compiled.pairs
    reach = 1 << 30 if emulated else MOST_VERIFIED_ROWS
    if own_weights:
        how = "in pairs (AVX-512-BF16)" if paired else "in float32"
        how = f"packed for one stream, added {how}"
        return ProductChoice("packed", reach, how)
    return ProductChoice("native", reach, "the caller's weights are read as they lie")


def _places(module: nn.Module) -> dict[int, list[_Place]]:
    """The layers that may be replaced, by the weight that they read.

    Of embeddings only those that share the weight of a Linear layer.
    """
    found: dict[int, list[_Place]] = {}
    for parent in module.modules():
        for name, child in parent._modules.items():
            if isinstance(child, nn.Linear | nn.Embedding) and _replaceable(child):
                place = _Place(parent, name, child)
                found.setdefault(id(child.weight), []).append(place)
    return {
        key: places
        for key, places in found.items()
        if any(isinstance(place.layer, nn.Linear) for place in places)
    }


def _replaceable(child: nn.Linear | nn.Embedding) -> bool:
    """Whether calling it is one product with a plain weight, or one look into it."""
    if type(child) not in (nn.Linear, nn.Embedding) or "forward" in child.__dict__:
        return False
    if child._forward_hooks or child._forward_pre_hooks:
        return False
    weight = child._parameters.get("weight")
    if weight is None or weight.dtype not in LINEAR_TYPES:
        return False
    if isinstance(child, nn.Embedding):
        plain = child.max_norm is None and not child.sparse
        return plain and _readable(weight, (child.num_embeddings, child.embedding_dim))
    bias = child._parameters.get("bias")
    return (
        _readable(weight, (child.out_features, child.in_features))
        and child.bias is bias
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
