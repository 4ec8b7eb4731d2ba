"""Load a language model and its tokenizer from a folder, or take a loaded one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptspec.errors import ModelLoadError
from adaptspec.model.checkpoints import (
    device_named,
    dtype_named,
    read_model,
    read_tokenizer,
)
from adaptspec.model.fixed_shapes import Shapes
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.views import unwrapped


def load_model(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    accelerate: bool = True,
    trust_remote_code: bool = False,
    shapes: Shapes = "auto",
    compile: bool = False,
) -> LanguageModel:
    """Load a model folder or hub name, or take a loaded model as it is.

    Args:
        dtype: ``auto`` keeps the checkpoint's. A loaded model keeps its own, and
            another is refused; so is another device.
        device: Default: CUDA if there is one, else the CPU.
        trust_remote_code: Whether code that comes with the model may run.
        shapes: Of forwards, see :class:`LanguageModel`.
        compile: See :class:`LanguageModel`.

    Raises:
        ModelLoadError: if it can't be found, read, or isn't a causal LM; if the device
            isn't there; if it has code of its own that isn't trusted.
    """
    if isinstance(model, nn.Module):
        if tokenizer is None:
            tokenizer = _tokenizer_of(unwrapped(model), trust_remote_code)
        taken = LanguageModel(
            model, tokenizer, accelerate=accelerate, shapes=shapes, compile=compile
        )
        check_kept(taken, dtype, device)
        return taken
    if not isinstance(model, str | os.PathLike):
        raise ModelLoadError(
            f"a folder, a hub name or a transformers model is expected, got "
            f"{type(model).__module__}.{type(model).__name__}; {_way_out(model)}"
        )
    path = str(model)
    loaded = read_model(path, dtype, device_named(device), trust_remote_code)
    if tokenizer is None:
        tokenizer = read_tokenizer(path, trust_remote_code)
    return LanguageModel(
        loaded,
        tokenizer,
        Path(path).name if Path(path).exists() else path,
        own_weights=True,
        accelerate=accelerate,
        shapes=shapes,
        compile=compile,
    )


def check_kept(
    model: LanguageModel, dtype: str | torch.dtype, device: str | torch.device | None
) -> None:
    """Refuse a type or device that a model loaded already doesn't have.

    Raises:
        ModelLoadError: naming what it has.
    """
    wanted = dtype_named(dtype)
    if wanted not in ("auto", model.dtype):
        raise ModelLoadError(
            f"dtype must be that of {model.name}, which is loaded already "
            f"({_short(model.dtype)}), got {_short(dtype)!r}; call its "
            f"to(torch.{_short(dtype)}) first, or leave dtype out"
        )
    if device is None:
        return
    place, here = device_named(device), model.device
    if place.type != here.type or place.index not in (None, here.index or 0):
        raise ModelLoadError(
            f"device must be that of {model.name}, which is loaded already ({here}), "
            f"got {str(device)!r}; call its to({str(device)!r}) first, or leave device "
            "out"
        )


def check_module(model: Any) -> None:
    """Refuse what isn't a loaded model, whose ``generate`` could be replaced.

    Raises:
        ModelLoadError: saying what to pass.
    """
    if isinstance(model, nn.Module):
        return
    way = "load it with AutoModelForCausalLM.from_pretrained and pass that"
    if isinstance(model, LanguageModel):
        way = "pass the module it was made from (its source)"
    elif model is not None and not isinstance(model, str | os.PathLike | type):
        way = _way_out(model)
    raise ModelLoadError(
        f"a loaded transformers model is expected, got {model!r:.80}; {way}"
    )


def _short(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _way_out(given: object) -> str:
    """What to pass in place of another library's object."""
    if isinstance(getattr(given, "model", None), nn.Module):  # a pipeline, a quantiser
        return "pass its .model"
    return (
        "pass the module it was made from, since graphs that were exported (ONNX, "
        "OpenVINO, torch.export) and other engines (vLLM, llama.cpp) run their own code"
    )


def _tokenizer_of(model: nn.Module, trust_remote_code: bool) -> Any:
    """The tokenizer beside a loaded model's weights, None if there is none."""
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not path or not Path(path).is_dir():
        return None
    try:
        return read_tokenizer(path, trust_remote_code)
    except ModelLoadError:
        return None
