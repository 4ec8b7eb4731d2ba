"""Reads a model folder with transformers; every failure is an error of one line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptspec.errors import ModelLoadError
from adaptspec.model.quantised import method_in

DTYPES = ("float32", "bfloat16", "float16", "float64")
MISSING_WEIGHTS_NAMED = 3  # missing weights that a message names
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"),
    *("tekken.json", "tokenizer_config.json", "sentencepiece.bpe.model"),
)
SETTINGS = ("config.json", "*_config.json", "*.index.json")
TRUST = (
    "needs code of its own; if you trust it, allow it with trust_remote_code=True "
    "(--trust-remote-code)"
)


def read_model(
    path: str, dtype: str | torch.dtype, place: torch.device, trust_remote_code: bool
) -> nn.Module:
    """The causal language model of a folder or hub name, on its device.

    Raises:
        ModelLoadError: if it can't be found or read, lacks weights, or doesn't fit.
    """
    from transformers import AutoModelForCausalLM

    reader: Any = AutoModelForCausalLM
    if Path(path).suffix == ".gguf" and Path(path).is_file():
        raise ModelLoadError(
            f"a model folder is expected, {path!r} is a GGUF file; read it with "
            "AutoModelForCausalLM.from_pretrained(folder, gguf_file=...) and pass the "
            "model, with its tokenizer"
        )
    if Path(path).is_file():
        raise ModelLoadError(
            f"a model folder is expected, {path!r} is a file; "
            "give a folder that from_pretrained reads"
        )
    if path.startswith(("/", ".", "~")) and not Path(path).exists():
        raise ModelLoadError(
            f"there is no folder {path!r}; give a folder that from_pretrained reads"
        )
    try:
        loaded, info = reader.from_pretrained(
            path,
            dtype=dtype_named(dtype),
            # Never a question on the terminal.
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model: nn.Module = loaded.to(place)
    # Readers of weights and a model's own code raise whatever they like.
    except Exception as error:
        raise ModelLoadError(
            f"can't load the model {path!r}: {_reason(error, path, place)}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        named = ", ".join(missing[:MISSING_WEIGHTS_NAMED]) + (
            ", ..." if missing[MISSING_WEIGHTS_NAMED:] else ""
        )
        method = _quantiser(Path(path))
        told = "" if method is None else f"it is quantised by {method}: "
        raise ModelLoadError(
            f"can't load the model {path!r}: {told}it lacks {len(missing)} weights of "
            f"{type(model).__name__} ({named}), which would be random; "
            "give a folder with all of them"
        )
    return model


def read_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder or hub name.

    Raises:
        ModelLoadError: if there is none, or it can't be read.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any((folder / n).exists() for n in TOKENIZER_FILES):
        raise ModelLoadError(
            f"there is no tokenizer in {path!r}; put its files there, or pass "
            "load(..., tokenizer=)"
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # readers in Rust raise Exception itself
        why = TRUST if _asks_for_trust(error) else _first_line(error)
        way = "" if why is TRUST else "; mend its files, or pass load(..., tokenizer=)"
        raise ModelLoadError(
            f"can't load the tokenizer of {path!r}: {why}{way}"
        ) from error


def device_named(device: str | torch.device | None) -> torch.device:
    """The device, known to be there; None: CUDA if there is one, else the CPU.

    Raises:
        ModelLoadError: naming those there are.
    """
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(wanted)
        if place.type == "meta" or (place.type == "cpu" and place.index):
            raise ModelLoadError("nothing can be computed there")
        torch.empty(1, device=place)
    except Exception as error:  # torch has one for each kind of device
        known = ", ".join(_devices())
        raise ModelLoadError(
            f"device must be one that is here ({known}), got {str(wanted)!r}"
        ) from error
    return place


def dtype_named(dtype: str | torch.dtype) -> str | torch.dtype:
    """A floating-point type by its name, or ``auto``.

    Raises:
        ModelLoadError: naming those there are.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return "auto"
    if name not in DTYPES:
        raise ModelLoadError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def _devices() -> list[str]:
    found = ["cpu"]
    with contextlib.suppress(AttributeError, RuntimeError):
        kind = torch.accelerator.current_accelerator(check_available=True)
        if kind is not None:
            count = torch.accelerator.device_count()
            found += [kind.type, *(f"{kind.type}:{i}" for i in range(count))]
    return found


def _reason(error: BaseException, path: str, place: torch.device) -> str:
    """Why loading failed, and what to do."""
    text = _first_line(error)
    if _asks_for_trust(error):
        return TRUST
    if method := _quantiser(Path(path)):
        return (
            f"it is quantised by {method}: {text} (install what that needs, take "
            "another device, or give the model unquantised)"
        )
    if damaged := _damaged(Path(path)):
        return f"{damaged} is damaged or cut short; fetch it again"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "allocate memory" in str(error) or "not enough memory" in str(error)
    ):
        return (
            f"it doesn't fit into the memory of {place}; free some, "
            "take a smaller model, or a smaller dtype"
        )
    if isinstance(error, ImportError):
        return f"{text} (install what it needs, or give a model without)"
    return f"{text} (give a folder that from_pretrained reads)"


def _quantiser(folder: Path) -> str | None:
    """How the weights of a folder were quantised, None if they weren't."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return method_in(settings.get("quantization_config"))
    return None


def _asks_for_trust(error: BaseException) -> bool:
    return "trust_remote_code" in str(error)


def _damaged(folder: Path) -> str | None:
    """The name of a file of weights, or of settings, that can't be read."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        return None
    for path in (p for n in SETTINGS for p in sorted(folder.glob(n))):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return path.name
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return path.name
    for path in sorted(folder.glob("*.bin")):
        try:
            torch.load(path, map_location="meta", weights_only=True)
        except Exception:  # of a zip archive, of pickle, of torch
            return path.name
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
