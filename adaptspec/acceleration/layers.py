"""Decoder layers recognised by what they compute, and run as one operation.

Nothing is known of a model's class. Where a layer's modules have the shape of attention
and a gated MLP, forwards of the model itself say how they are put together: each way to
do so is compared with what the layer's own modules compute of the same input, within
the rounding of its type. A layer that none of them gives is left alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptspec.acceleration.attention import NATIVE, Attended, watched
from adaptspec.acceleration.decoder_layer import (
    CACHE_NAMES,
    Linear,
    Norm,
    Norms,
    Recipe,
    WholeLayer,
    acts,
    hooks_of,
    packed_of,
)
from adaptspec.acceleration.native import (
    Kernel,
    NativeUnavailableError,
    is_plain,
    kernel,
)
from adaptspec.model.cache import TreeCache

# What modules of a layer are called where there are such. Names only propose.
INTO = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
GATE_UP = (("gate_proj", "up_proj"), ("gate_up_proj",))
OUT, DOWN = "o_proj", "down_proj"
MOST_ADDED = 1e-2  # to a mean square
ACTIVATIONS = (0, 1, 2)  # SiLU, GELU by tanh, GELU: see layer.c

# How far two ways to compute the same may be apart, by the largest number of a row.
ROUNDING = {torch.bfloat16: 2**-6, torch.float32: 2e-5}


@dataclass(frozen=True)
class Parts:
    """A layer's modules by their place in it."""

    into: tuple[Linear, ...]
    out: Linear
    gate_up: tuple[Linear, ...]
    down: Linear
    norms: tuple[Norm, ...]  # of the layer, in its order
    query: Norm | None
    key: Norm | None


class _Whole(nn.Module):
    """Mixed into a layer's class: its ``forward`` is one operation where that is so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own."""
        own = super().forward
        whole: WholeLayer | _Trial | None = self.__dict__.get("whole")
        if isinstance(whole, _Trial):
            return whole.forward(own, args, kwargs)
        if whole is not None and (found := whole(args, kwargs)) is not None:
            return found
        return own(*args, **kwargs)


class _Trial:
    """Finds out in a few forwards what a layer computes.

    It is refuted once no way to compute it agrees with the layer's own modules.
    """

    def __init__(self, layer: nn.Module, parts: Parts, compiled: Kernel) -> None:
        self.layer, self._parts, self._kernel = layer, parts, compiled
        self.found: WholeLayer | None = None
        self.refuted = False

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the layer runs its modules."""

    def forward(self, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the layer's own gives; the ways to compute it are compared with it."""
        cache = next((kwargs[name] for name in CACHE_NAMES if name in kwargs), None)
        if (
            self.refuted
            or len(args) != 1
            or type(cache) is not TreeCache
            or not all(row.is_initialized for row in cache.rows)
        ):
            return own(*args, **kwargs)
        before = [row.length for row in cache.rows]
        for x in _varied(args[0], self._parts):
            if not self.refuted:
                self._compare(own, x, kwargs, cache, before)
            for row, length in zip(cache.rows, before, strict=True):
                row.length = length
        return own(*args, **kwargs)

    def _compare(
        self,
        own: Callable[..., Any],
        x: torch.Tensor,
        kwargs: Any,
        cache: TreeCache,
        before: list[int],
    ) -> None:
        """Look for a way that gives what ``own`` does, rows of the cache included."""
        with watched() as noted:
            expected = own(x, **kwargs)
        grown = [i for i, row in enumerate(cache.rows) if row.length != before[i]]
        asked = noted[0] if len(noted) == 1 else None
        if len(grown) != 1 or asked is None or not _fits(asked, x, kwargs, expected):
            self.refuted = True
            return
        kept, start = cache.rows[grown[0]], before[grown[0]]
        assert kept.keys is not None
        assert kept.values is not None
        new = slice(start, kept.length)
        own_rows = [kept.keys[0, :, new].clone(), kept.values[0, :, new].clone()]
        # Rounding may hide which of two activations it is: the nearest counts.
        nearest = math.inf
        for whole in self._ways(asked, grown[0], kwargs):
            kept.length = start
            kept.keys[0, :, new] = kept.values[0, :, new] = 0
            found = whole((x,), kwargs)
            if found is None:
                continue
            rows = [kept.keys[0, :, new], kept.values[0, :, new]]
            apart = float((found.float() - expected.float()).abs().mean())
            if (
                apart < nearest
                and all(map(_alike, rows, own_rows))
                and _alike(whole.queries(x.shape[1]).to(x.dtype), asked.query[0])
                and _alike(found.float() - x, expected.float() - x, beside=expected)
            ):
                self.found, nearest = whole, apart
        self.refuted = nearest == math.inf

    def _ways(self, asked: Attended, index: int, kwargs: Any) -> Iterator[WholeLayer]:
        """What it may compute; only what was found before, if that is so."""
        if self.found is not None:
            same = self.found.recipe
            if same.scale == asked.scale and same.index == index:
                yield self.found
            return
        parts = self._parts
        _, heads, _, head = asked.query.shape
        groups = asked.key.shape[1]
        for norms, turned, activation, up_first in itertools.product(
            _placed(parts), (True, False), ACTIVATIONS, (False, True)
        ):
            recipe = Recipe(
                into=parts.into,
                out=parts.out,
                gate_up=parts.gate_up,
                down=parts.down,
                norms=norms,
                heads=heads,
                groups=groups,
                head=head,
                scale=asked.scale,
                index=index,
                turned=turned,
                activation=activation,
                up_first=up_first,
            )
            try:
                yield WholeLayer(self.layer, recipe, self._kernel)
            except ValueError:
                continue


def fuse_layers(module: nn.Module, run: Callable[[], object]) -> int:
    """Run the decoder layers of ``module`` as one operation each where they allow it.

    Args:
        module: A module tree of ours, whose Linear layers were replaced.
        run: Forwards of it over a few tokens and a TreeCache, which attend to tokens
            near and far.

    Returns:
        How many do.
    """
    config = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", None) != NATIVE:
        return 0
    try:
        compiled = kernel()
    except NativeUnavailableError:
        return 0
    trials = []
    for layer in module.modules():
        parts = _parts(layer)
        # Matrix units have products of their own.
        if parts and not (compiled.tiles and _type_of(parts.out) is torch.bfloat16):
            trials.append(_Trial(layer, parts, compiled))
    if not trials:
        return 0
    for trial in list(trials):
        kind = type(trial.layer)
        try:
            if not issubclass(kind, _Whole):
                trial.layer.__class__ = _whole_class(kind)  # type: ignore[arg-type]
        except TypeError:  # a class that can't be mixed with another
            trials.remove(trial)
        else:
            trial.layer.__dict__["whole"] = trial
    failed = True
    try:
        run()
        failed = False
    except Exception:  # of the model's own, for the probe to find out
        pass
    finally:
        count = sum(_settled(trial, failed) for trial in trials)
    return count


def _settled(trial: _Trial, failed: bool) -> bool:
    """End a trial: whether its layer runs as one operation from now on."""
    if failed or trial.refuted or trial.found is None:
        trial.layer.__class__ = type(trial.layer).__mro__[2]
        del trial.layer.__dict__["whole"]
        return False
    trial.layer.__dict__["whole"] = trial.found
    return True


@functools.cache
def _whole_class(kind: type[nn.Module]) -> type[nn.Module]:
    """That of a layer which may be one operation; an instance stays one of ``kind``."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Whole, kind), names)


def _parts(layer: nn.Module) -> Parts | None:
    """The modules of a decoder layer; None where there are others, or hooks."""
    children = list(layer._modules.values())
    if layer._parameters or layer._buffers or "forward" in layer.__dict__:
        return None
    inside = [x for x in layer.modules() if x is not layer]
    held = [h for x in inside for h in (x._forward_hooks, x._forward_pre_hooks)]
    if any(map(acts, hooks_of(held))):
        return None
    attention = [x for x in children if x is not None and OUT in x._modules]
    mlp = [x for x in children if x is not None and DOWN in x._modules]
    if len(attention) != 1 or len(mlp) != 1 or attention[0] is mlp[0]:
        return None
    into = _linears(attention[0], INTO)
    gate_up = _linears(mlp[0], GATE_UP)
    out = _linears(attention[0], ((OUT,),))
    down = _linears(mlp[0], ((DOWN,),))
    if not (into and gate_up and out and down):
        return None
    rest = [x for x in children if x is not attention[0] and x is not mlp[0]]
    norms = [_norm(x) for x in rest if x is not None and _owns(x)]
    inner = [attention[0]._modules.get(name) for name in ("q_norm", "k_norm")]
    query, key = (None if x is None else _norm(x) for x in inner)
    known = [norm for norm in (*norms, query, key) if norm is not None]
    linears = (*into, *gate_up, *out, *down)
    taken = {id(x) for x in (*linears, *(norm.module for norm in known))}
    if (
        None in norms
        or any("forward" in x.__dict__ for x in layer.modules())
        or any(_owns(x) and id(x) not in taken for x in layer.modules())
    ):
        return None
    kinds = set(map(_type_of, linears))
    kinds |= {_weight(norm.module).dtype for norm in known}
    kinds |= {x.bias.dtype for x in linears if x.bias is not None}
    if len(kinds) != 1:
        return None
    placed = tuple(norm for norm in norms if norm is not None)
    return Parts(into, out[0], gate_up, down[0], placed, query, key)


def _linears(
    module: nn.Module, choices: tuple[tuple[str, ...], ...]
) -> tuple[Linear, ...]:
    """Our layers of the first choice of names that is there, else none."""
    for names in choices:
        held = [module._modules.get(name) for name in names]
        found = tuple(
            x
            for x in held
            if isinstance(x, Linear)
            and (x.bias is None or (is_plain(x.bias) and x.bias.is_contiguous()))
        )
        if len(found) == len(names):
            return found
    return ()


def _type_of(linear: Linear) -> torch.dtype:
    packed = packed_of(linear)
    return linear.weight.dtype if packed is None else packed.dtype


def _owns(module: nn.Module) -> bool:
    """Whether it has parameters or buffers of its own."""
    held = (*module._parameters.values(), *module._buffers.values())
    return isinstance(module, Linear) or any(x is not None for x in held)


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


@torch.inference_mode()
def _norm(module: nn.Module) -> Norm | None:
    """What a module computes if it divides by the root mean square, else None."""
    weight = module._parameters.get("weight")
    held = (*module._parameters.values(), *module._buffers.values())
    if (
        weight is None
        or sum(x is not None for x in held) != 1
        or module._modules
        or weight.dim() != 1
        or weight.dtype not in ROUNDING
        or not is_plain(weight)
        or not weight.is_contiguous()
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    # Not around 0, so that what subtracts the mean shows.
    x = torch.randn((3, weight.shape[0]), generator=generator) + 1
    # The least of them is where what is added to the mean square decides.
    x = (x * torch.tensor([[1.0], [30.0], [1e-3]])).to(weight.dtype)
    try:
        expected = module(x)
    except Exception:  # made for other inputs
        return None
    if not isinstance(expected, torch.Tensor) or expected.dtype is not weight.dtype:
        return None
    added = [
        value
        for value in module.__dict__.values()
        if isinstance(value, float) and 0 < value < MOST_ADDED
    ]
    ways = itertools.product(added, (0.0, 1.0), (True, False))
    norms = [Norm(module, *way) for way in ways]
    # Of those that agree the nearest: they differ in when they round.
    apart = [(float((_normed(n, x) - expected).abs().max()), n) for n in norms]
    best = min(apart, key=lambda pair: pair[0], default=None)
    if best is None or not _alike(_normed(best[1], x), expected):
        return None
    return best[1]


def _normed(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.epsilon)
    if norm.early:
        wide = wide.to(x.dtype).float()
    return (wide * (_weight(norm.module).float() + norm.offset)).to(x.dtype)


def _placed(parts: Parts) -> list[Norms]:
    """Where a layer's norms may stand, likeliest first."""
    inner = {"query": parts.query, "key": parts.key}
    match parts.norms:
        case (a, b):
            return [
                Norms(before_attention=a, before_mlp=b, **inner),
                Norms(after_attention=a, after_mlp=b, **inner),
                Norms(before_attention=b, before_mlp=a, **inner),
            ]
        case (a, b, c, d):
            return [Norms(a, b, c, d, **inner)]
    return []


def _varied(x: torch.Tensor, parts: Parts) -> Iterator[torch.Tensor]:
    """Inputs that reach far into what weights can give, where a limit would show, and
    ``x`` itself."""
    rows = x.shape[1]
    size = x.float().pow(2).mean().sqrt()
    # A small one leaves the sums of a layer to its attention.
    for linears, share in ((parts.into, 1e-2), (parts.gate_up, 1.0)):
        chosen = []
        for row in range(rows):
            linear = linears[row % len(linears)]
            place = torch.tensor([(7919 * (row + 1)) % linear.out_features])
            packed = packed_of(linear)
            found = linear.weight[place] if packed is None else packed.rows(place)
            assert found is not None
            chosen.append(found[0].float())
        aligned = torch.stack(chosen)
        aligned /= aligned.pow(2).mean(-1, keepdim=True).sqrt() + 1e-12
        yield (aligned * size * share).to(x.dtype)[None]
    yield x


def _fits(asked: Attended, x: torch.Tensor, kwargs: Any, expected: Any) -> bool:
    """Whether attention and output have the shapes that one of ours has."""
    query, key = asked.query, asked.key
    return (
        type(expected) is torch.Tensor
        and expected.shape == x.shape
        and expected.dtype is x.dtype
        and asked.plain
        and asked.mask is kwargs.get("attention_mask")
        and query.dim() == key.dim() == 4
        and query.shape[2] == x.shape[1]
        and query.shape[3] == key.shape[3]
        and query.shape[1] % key.shape[1] == 0
        and query.dtype is x.dtype
    )


def _alike(
    found: torch.Tensor, expected: torch.Tensor, beside: torch.Tensor | None = None
) -> bool:
    """Whether they differ by no more than rounding, that of ``beside`` included."""
    allowed = ROUNDING[beside.dtype if beside is not None else found.dtype]
    wide = expected.float()
    room = allowed * wide.abs().amax(-1, keepdim=True)
    if beside is not None:
        room = room + allowed * beside.float().abs() / 2
    return bool(((found.float() - wide).abs() <= room).all())
