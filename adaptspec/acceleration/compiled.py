"""Parts of decoder layers run as ``torch.compile`` makes them, where a user waits once.

Compiled are the parts of repeated layers that read one tensor and give one of its
shape: norms and MLPs. They see neither cache nor mask, so that one compilation of a
class, for any number of rows, serves all layers. Each part is kept only if it gives
what its module does, within the rounding of the type.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adaptspec.acceleration.layers import ROUNDING
from adaptspec.cache_folder import cache_root
from adaptspec.errors import ModelLoadError

CACHE_DIR_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
HALF_ROUNDING = 2**-9  # of float16


def compile_parts(module: nn.Module, run: Callable[[], object]) -> int:
    """Compile norms and MLPs of the repeated layers of ``module``, in place.

    Compiled code is kept in AdaptSpec's cache folder, or where the environment's
    TORCHINDUCTOR_CACHE_DIR says, and serves later processes.

    Args:
        module: A module tree of ours, whose Linear layers are torch's own.
        run: A forward of it over a few tokens.

    Returns:
        How many parts run compiled.

    Raises:
        ModelLoadError: if there is no C++ compiler for a model on the CPU.
    """
    if next(module.parameters()).device.type == "cpu":
        _need_compiler()
    os.environ.setdefault(CACHE_DIR_VARIABLE, str(cache_root() / "inductor"))
    seen = _watch(module, run)
    forwards: dict[type[nn.Module], Callable[..., Any]] = {}
    count = 0
    for part, x in seen.items():
        kind = type(part)
        if kind not in forwards:
            forwards[kind] = torch.compile(kind.forward, dynamic=True)
        forward = functools.partial(forwards[kind], part)
        if _gives_the_same(part, forward, x):
            part.forward = forward
            count += 1
    return count


def _need_compiler() -> None:
    """Refuse by name where nothing can build what is compiled for the CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        raise ModelLoadError(
            "compile=True needs a C++ compiler, and none was found; install g++ or "
            "name one in CXX, or leave compile out"
        ) from None


def _watch(
    module: nn.Module, run: Callable[[], object]
) -> dict[nn.Module, torch.Tensor]:
    """The outermost parts that read one tensor and give one like it; what they read."""
    layers = [x for held in _repeated(module) for x in held]
    parts = [p for layer in layers for p in layer.children() if _may_be(p)]
    found: dict[nn.Module, torch.Tensor] = {}
    refused: set[nn.Module] = set()

    def note(part: nn.Module, args: Any, kwargs: Any, given: Any) -> None:
        alike = (
            len(args) == 1
            and not kwargs
            and all(isinstance(x, torch.Tensor) for x in (*args, given))
            and given.shape == args[0].shape
            and given.dtype == args[0].dtype
        )
        if alike:
            found[part] = args[0].detach().clone()
        else:
            refused.add(part)

    handles = [p.register_forward_hook(note, with_kwargs=True) for p in parts]
    try:
        run()
    except Exception:  # of a model that keeps a state of its own, such as Mamba
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return {part: x for part, x in found.items() if part not in refused}


def _repeated(module: nn.Module) -> list[nn.ModuleList]:
    """The lists of layers of one class or of few."""
    lists = [x for x in module.modules() if isinstance(x, nn.ModuleList)]
    return [x for x in lists if len({type(layer) for layer in x}) < len(x)]


def _may_be(part: nn.Module) -> bool:
    """Whether no hooks, no forward of an instance and no lone product are in it."""
    return not isinstance(part, nn.Linear | nn.Dropout | nn.Identity) and not any(
        "forward" in x.__dict__ or x._forward_hooks or x._forward_pre_hooks
        for x in part.modules()
    )


@torch.inference_mode()
def _gives_the_same(
    part: nn.Module, forward: Callable[..., Any], x: torch.Tensor
) -> bool:
    """Of several rows and of one; what fails to compile does not."""
    most = ROUNDING.get(x.dtype, HALF_ROUNDING)
    for rows in (x, x[:, :1].contiguous()):
        own = part(rows).float()
        try:
            found = forward(rows).float()
        except RuntimeError:  # as the compiler's errors are: the module's own is there
            return False
        apart = (own - found).abs().amax(-1)
        if not bool((apart <= most * own.abs().amax(-1)).all()):
            return False
    return True
