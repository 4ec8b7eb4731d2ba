"""The fingerprint of a model's weights, and the attention that our masks need."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from adaptspec.model import offloaded
from adaptspec.model.views import adapters


def weights_digest(model: nn.Module) -> str:
    """A fingerprint of configuration and weights, from a sample of every tensor.

    64 evenly spaced elements of each parameter are hashed with its name, shape and
    type: the same for a folder and the model loaded from it, in milliseconds. Adapters
    count with whether and how strongly they are in force.
    """
    digest = hashlib.sha256()
    digest.update(type(model).__name__.encode())
    for name, parameter in sorted(offloaded.weights(model), key=itemgetter(0)):
        name = name.replace("_orig_mod.", "")  # compiled or not
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        for part in _plain_parts(parameter):
            digest.update(_sampled(part))
    for text in adapters(model):
        digest.update(text.encode())
    return digest.hexdigest()[:16]


# Of a configuration: where it came from, and how weights were read.
UNTOLD = (
    *("_name_or_path", "architectures", "transformers_version"),
    *("dtype", "torch_dtype"),
)


def configuration_digest(model: nn.Module) -> str:
    """A fingerprint of what decides a model's outputs and speed besides its weights.

    The configuration, as far as it doesn't say where the model came from, and a sample
    of every buffer, as of weights (:func:`weights_digest`).
    """
    config: Any = getattr(model, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else {}
    digest = hashlib.sha256(
        json.dumps(_without(told), sort_keys=True, default=str).encode()
    )
    for name, buffer in sorted(model.named_buffers()):
        name = name.replace("_orig_mod.", "")
        digest.update(f"{name}{tuple(buffer.shape)}".encode())
        for part in _plain_parts(buffer.detach()):
            digest.update(_sampled(part))
    return digest.hexdigest()[:16]


def _without(told: Any) -> Any:
    """Without ``UNTOLD``, of inner configurations, too."""
    if isinstance(told, Mapping):
        return {str(k): _without(v) for k, v in told.items() if k not in UNTOLD}
    return told


def _sampled(part: torch.Tensor) -> bytes:
    flat = part.reshape(-1)
    step = max(1, flat.numel() // 64)
    sample = flat[::step][:64].float().cpu().contiguous()
    return sample.numpy().tobytes()


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


def _use_masked_attention(view: nn.Module) -> None:
    """Flash and flex kernels take no mask of ours; SDPA does, and eager attention."""
    implementation = str(getattr(view.config, "_attn_implementation", "") or "")
    if "flash" not in implementation and "flex" not in implementation:
        return
    for other in ("sdpa", "eager"):
        with contextlib.suppress(ValueError, ImportError, AttributeError):
            view.set_attn_implementation(other)  # type: ignore[operator]
            return
