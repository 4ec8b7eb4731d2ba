"""The module tree that decoding runs: a copy of the caller's that shares its weights.

A copy has its own attention implementation, layers and evaluation mode, so the caller's
module is never changed. It is rebuilt when the caller changes that module afterwards:
see :func:`snapshot`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

from adaptspec.acceleration.packed import PackedEmbedding, PackedLinear
from adaptspec.model.offloaded import is_offloaded, missing_weights
from adaptspec.model.quantised import is_quantised, quantised_by

# What every module has; hooks and contents are looked at apart. Decoding runs no
# ``generate``, which someone may have replaced.
_COMMON = frozenset(nn.Module().__dict__) | {"_compiled_call_impl", "generate"}
_SIMPLE = (bool, int, float, str)
# Classes of torch and DeepSpeed whose forward needs those of other processes.
_SPLITTING = frozenset(
    ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine", "PipelineModule")
)
_ORDINARY = ("torch.nn.modules.", "transformers.models.")


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without wrappers that change no output: torch.compile, DataParallel.

    Their own ``generate`` runs the inner module, too; compiled code would be compiled
    again for every size of a tree.
    """
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def unfit(model: nn.Module) -> str | None:
    """What stands in the way of decoding with it, said of it; None if nothing does."""
    if missing := missing_weights(model):
        return (
            f"has {missing} weights on the meta device, which no hook brings into "
            "memory; load them"
        )
    if shared := _shared_by_processes(model):
        return (
            f"is split over processes ({shared}), which would each decide by their own "
            "clock what to draft; load it whole in each (without tp_plan, FSDP or "
            "DeepSpeed), or over one process's devices with device_map"
        )
    for name, config in _adapter_settings(model):
        kind = _kind(config)
        if getattr(config, "is_prompt_learning", False):
            why = "puts virtual tokens before every pass"
        elif getattr(config, "alora_invocation_tokens", None) or kind == "XLORA":
            why = "needs what its own generate works out from the prompt"
        else:
            continue
        return (
            f"has the adapter {name!r} ({kind}), which {why}; decode it with its own "
            "generate, or activate another adapter"
        )
    return None


def told_of(model: nn.Module) -> str:
    """Clauses on its quantiser and adapters, for a message on a model that doesn't
    run; empty where it has none."""
    kinds = [f"{name!r} ({_kind(c)})" for name, c in _adapter_settings(model)]
    if not kinds:
        return quantised_by(model)
    return (
        f"{quantised_by(model)}; it has the adapter {', '.join(kinds)}: decode it with "
        "its own generate, or activate another adapter"
    )


def _kind(config: Any) -> str:
    return str(getattr(config, "peft_type", "")).rpartition(".")[2]


def _adapter_settings(model: Any) -> list[tuple[str, Any]]:
    """The active adapters of a PeftModel and their configurations."""
    known = getattr(model, "peft_config", None)
    active = getattr(model, "active_adapters", None)
    if not isinstance(known, dict) or active is None:
        return []
    try:
        names = active() if callable(active) else active
    except ValueError:  # transformers' own, where none was loaded
        return []
    return [(name, known[name]) for name in names if name in known]


def _shared_by_processes(model: nn.Module) -> str | None:
    """What splits the weights over several processes, None if nothing does."""
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _SPLITTING:
                return cls.__name__
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            return "DeepSpeed"
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and mesh.size() > 1:
            return type(parameter).__name__
    return None


def view_of(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every weight with ``model``.

    Buffers that aren't saved with weights are copied: some models write to them.
    Quantised layers and others that tie their own state to a weight are shared whole: a
    copy would take that state from the original. ``model`` itself comes back where a
    copy wouldn't be one: weights on several devices or offloaded, a ``forward``
    replaced by a function (which calls the original's modules), or modules that can't
    be copied.
    """
    places = getattr(model, "hf_device_map", None)
    if (places and len(set(places.values())) > 1) or is_offloaded(model):
        return model  # hooks that move weights between devices don't survive a copy
    if any(_calls_the_original(module) for module in model.modules()):
        return model
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                memo[id(tensor)] = tensor
    quantised = is_quantised(model)
    kept = [module for module in model.modules() if _stays(module, quantised)]
    memo.update((id(module), module) for module in kept)
    try:
        for module in model.modules():
            if "_orig_mod" in module._modules:
                memo[id(module)] = copy.deepcopy(module._modules["_orig_mod"], memo)
        view: nn.Module = copy.deepcopy(model, memo)
    except Exception:  # whatever a module's own code raises: it can't be copied
        return model
    shared = set(kept)
    for module in view.modules():
        if module in shared:
            continue
        module.training = False
        if _compiled(module.__dict__.get("forward")):
            del module.forward  # the class's own again
    return view


def replaced_layers(model: nn.Module) -> list[nn.Module]:
    """Layers with weights that neither torch nor the family's code defines."""
    return [
        module
        for module in model.modules()
        if (module._parameters or module._buffers) and _stays(module, quantised=True)
    ]


def drops(model: nn.Module) -> bool:
    """Whether a forward pass of it is random: dropout in training mode."""
    return any(
        value > 0
        for module in model.modules()
        if module.training
        for name, value in module.__dict__.items()
        if isinstance(value, float)
        and ("dropout" in name or (name == "p" and "Drop" in type(module).__name__))
    )


def accepted_arguments(model: nn.Module) -> set[str]:
    """Names that calling ``model`` understands, through wrappers that pass others on.

    Adapters, hooks and patched forwards take ``*args, **kwargs``; what they wrap tells.
    """
    names: set[str] = set()
    for forward in _forwards(model):
        parameters = inspect.signature(forward).parameters.values()
        names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """What a view, its capability and its digest depend on, to be compared with a later
    one: modules, weights, hooks and plain settings, adapters' among them.

    Neither evaluation mode nor state that decoding leaves in modules counts.
    """
    found: list[Any] = [
        id(getattr(model, "generation_config", None)),
        getattr(getattr(model, "config", None), "_attn_implementation", None),
    ]
    for module in model.modules():
        found.append(id(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.append(_state_of(tensor))
        found.extend(map(id, module._forward_hooks.values()))
        found.extend(map(id, module._forward_pre_hooks.values()))
        for name, value in module.__dict__.items():
            if name not in _COMMON and (setting := _setting(value)) is not None:
                found.append((name, setting))
    return tuple(found)


def adapters(model: nn.Module) -> list[str]:
    """Which adapters (PEFT) are in force and how strongly, layer by layer."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "merged_adapters") and hasattr(module, "active_adapters"):
            found.append(
                f"{name}:{module.active_adapters}:{module.merged_adapters}:"
                f"{getattr(module, 'disable_adapters', False)}:"
                f"{getattr(module, 'scaling', None)}"
            )
    return found


def _forwards(model: nn.Module) -> Iterator[Any]:
    """What a call goes through, outermost first."""
    seen: set[int] = set()
    inner: nn.Module | None = model
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        if "forward" in inner.__dict__:
            yield inner.forward
        yield type(inner).forward
        inner = next(
            (
                child
                for child in (_base(inner), *inner.children())
                if child is not None and hasattr(child, "get_output_embeddings")
            ),
            None,
        )


def _base(model: Any) -> nn.Module | None:
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else None


def _calls_the_original(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    if "_orig_mod" in module._modules:  # compiled; the view has what is inside
        return False
    return isinstance(forward, FunctionType) and not _compiled(forward)


def _compiled(forward: Any) -> bool:
    """Whether it is a compiled form of the class's own."""
    original = getattr(forward, "_torchdynamo_orig_callable", None)
    owner = getattr(original, "__self__", None)
    if original is None or owner is None:
        return False
    return original.__func__ is type(owner).forward


def _stays(module: nn.Module, quantised: bool) -> bool:
    """Whether the view uses the caller's own."""
    if isinstance(module, PackedLinear | PackedEmbedding):
        return True
    if any(True for _ in module.children()):
        return False
    if quantised and not type(module).__module__.startswith(_ORDINARY):
        return True
    owned = (*module._parameters.values(), *module._buffers.values())
    if any(t is not None and _is_special(t) for t in owned):
        return True
    return any(
        isinstance(value, torch.ScriptObject)
        or (isinstance(value, torch.Tensor) and type(value) is not torch.Tensor)
        for value in module.__dict__.values()
    )


def _is_special(tensor: torch.Tensor) -> bool:
    """Of another kind than a plain matrix or vector of floating-point numbers."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return True
    return tensor.dim() > 1 and not tensor.is_floating_point()


def _state_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return (id(tensor),)
    if tensor.is_meta:  # a hook puts another one there after each pass
        return tuple(tensor.shape), tensor.dtype
    version = -1 if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.data_ptr(), tensor.dtype


def _setting(value: Any) -> Any:
    """A comparable form of an attribute, None for what doesn't count."""
    if value is None or isinstance(value, torch.Tensor):
        return None
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        items = list(value)
    elif isinstance(value, dict):
        items = [part for item in value.items() for part in item]
    else:
        return id(value)
    simple = all(item is None or isinstance(item, _SIMPLE) for item in items)
    return repr(value) if simple else id(value)
