"""Weights that accelerate's hooks bring into memory for the pass of their layer.

Between passes such a parameter is on the meta device. A pass over a draft brings each
weight in once for all of its tokens, so drafts save most where weights are offloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def missing_weights(model: nn.Module) -> int:
    """How many parameters are nowhere: on the meta device, and no hook has them."""
    fetched = {id(parameter) for parameter, _ in _offloaded(model)}
    return sum(p.is_meta and id(p) not in fetched for p in model.parameters())


def is_offloaded(model: nn.Module) -> bool:
    """Whether hooks bring any of its weights in."""
    return next(_offloaded(model), None) is not None


def weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Its parameters by name, offloaded ones as they are stored."""
    stored = {id(parameter): fetch for parameter, fetch in _offloaded(model)}
    for name, parameter in model.named_parameters():
        hook = stored.get(id(parameter))
        yield name, parameter.detach() if hook is None else hook()


def device_of(model: nn.Module) -> torch.device:
    """Where its first weight is when it is used."""
    first = next(model.parameters())
    for module in model.modules():
        if any(parameter is first for parameter in module._parameters.values()):
            for hook in _hooks(module):
                if first.is_meta and hook.execution_device is not None:
                    return torch.empty(0, device=hook.execution_device).device
    return first.device


def _offloaded(model: nn.Module) -> Iterator[tuple[nn.Parameter, Any]]:
    """Parameters on the meta device, with what gives their elements."""
    for module in model.modules():
        for hook in _hooks(module):
            below = bool(getattr(hook, "place_submodules", False))
            # Asking ``in`` would read the weight; keys have their prefix here.
            known, prefix = (
                set(hook.weights_map),
                getattr(hook.weights_map, "prefix", ""),
            )
            for name, parameter in module.named_parameters(recurse=below):
                if parameter.is_meta and f"{prefix}{name}" in known:
                    yield parameter, functools.partial(hook.weights_map.get, name)


def _hooks(module: nn.Module) -> list[Any]:
    """Those of accelerate that bring weights in; imported by whoever attached them."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])  # several in turn, or one
    return [h for h in hooks if getattr(h, "weights_map", None) is not None]
