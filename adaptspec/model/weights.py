"""Module trees that share a model's weights, and the fingerprint of the weights."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from typing import Any

import torch
from torch import nn

from adaptspec.model.views import adapters


def weights_digest(model: nn.Module) -> str:
    """A fingerprint of configuration and weights, from a sample of every tensor.

    64 evenly spaced elements of each parameter are hashed with its name, shape and
    type: the same for a folder and the model loaded from it, in milliseconds. Adapters
    count with whether and how strongly they are in force.
    """
    digest = hashlib.sha256()
    digest.update(type(model).__name__.encode())
    for name, parameter in sorted(model.named_parameters()):
        name = name.replace("_orig_mod.", "")  # compiled or not
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        for part in _plain_parts(parameter.detach()):
            flat = part.reshape(-1)
            step = max(1, flat.numel() // 64)
            sample = flat[::step][:64].float().cpu().contiguous()
            digest.update(sample.numpy().tobytes())
    for text in adapters(model):
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def _plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The ordinary tensors that hold the elements; a subclass may have several."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return [] if tensor.is_meta else [tensor]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        held = [getattr(tensor, name) for name in flatten()[0]]
        tensors = [value for value in held if isinstance(value, torch.Tensor)]
        return [part for value in tensors for part in _plain_parts(value)]
    try:
        readable = tensor.data_ptr() != 0
    except RuntimeError:  # it has no memory of its own
        readable = False
    return [tensor.as_subclass(torch.Tensor)] if readable else []


def _cut(model: nn.Module, total: int, layers: int) -> nn.Module:
    """``model`` with ``layers`` of its ``total`` decoder layers.

    Copied are the modules above the layers, their list and their configurations.
    """
    lists = [
        name
        for name, child in model.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    outermost = [n for n in lists if not any(n.startswith(f"{o}.") for o in lists)]
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise ValueError(f"one list of {total} layers is needed to cut, found {found}")
    configs: dict[int, Any] = {}  # deepcopy's memo: configurations may share a part
    top = module = _twin(model, configs, layers)
    for name in outermost[0].split("."):
        child = _twin(module._modules[name], configs, layers)
        module._modules[name] = child
        module = child
    for name in list(module._modules)[layers:]:
        del module._modules[name]
    return top


def _twin(module: Any, configs: dict[int, Any], layers: int) -> nn.Module:
    """A copy with a module dictionary and configuration of its own."""
    twin: nn.Module = copy.copy(module)
    twin._modules = dict(module._modules)
    if "config" in module.__dict__:
        config: Any = copy.deepcopy(module.config, configs)
        twin.config = config
        text = config.get_text_config(decoder=True)
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = list(text.layer_types[:layers])
    return twin


def _use_masked_attention(view: nn.Module) -> None:
    """Flash and flex kernels take no mask of ours; SDPA does, and eager attention."""
    implementation = str(getattr(view.config, "_attn_implementation", "") or "")
    if "flash" not in implementation and "flex" not in implementation:
        return
    for other in ("sdpa", "eager"):
        with contextlib.suppress(ValueError, ImportError, AttributeError):
            view.set_attn_implementation(other)  # type: ignore[operator]
            return
