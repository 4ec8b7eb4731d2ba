"""Tensors of a checkpoint by name, read one at a time from any of its files."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adaptspec.errors import HeadsLoadError
from adaptspec.heads.measured_paths import read_json

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# In the order in which they are looked for.
WEIGHT_FILES = (
    "medusa_lm_head.safetensors",
    "medusa_lm_head.pt",
    *INDICES,
    "model.safetensors",
    "pytorch_model.bin",
)


class TensorFiles:
    """Names, shapes and tensors of one checkpoint.

    Args:
        where: What people call it.
        files: Tensor's name -> the file that holds it; None: read it from the file.
    """

    def __init__(self, where: Path, files: Mapping[str, Path] | None = None) -> None:
        self.where = where
        self._open: dict[Path, Any] = {}
        if files is None:
            files = {name: where for name in self._file(where)}
        self._files = dict(files)

    @property
    def names(self) -> list[str]:
        """All tensors there are."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor where the file allows it."""
        held = self._held(name)
        if isinstance(held, torch.Tensor):
            return tuple(held.shape)
        return tuple(held.get_slice(name).get_shape())

    def get(self, name: str) -> torch.Tensor:
        """A tensor of its own."""
        held = self._held(name)
        if isinstance(held, torch.Tensor):
            return held.detach().clone()
        tensor: torch.Tensor = held.get_tensor(name)
        return tensor

    def refusal(self, name: str, problem: str) -> HeadsLoadError:
        """An error about one tensor."""
        return HeadsLoadError(f"{self._files[name]}: {name} {problem}")

    def _held(self, name: str) -> Any:
        path = self._files[name]
        file = self._file(path)
        if name not in file:
            raise HeadsLoadError(
                f"{path} lacks {name}, which {self.where} places in it"
            )
        return file[name]

    def _file(self, path: Path) -> Mapping[str, Any]:
        if path not in self._open:
            self._open[path] = _opened(path)
        opened: Mapping[str, Any] = self._open[path]
        return opened


def find_weights(folder: Path) -> TensorFiles:
    """The weights in ``folder``.

    Raises:
        HeadsLoadError: if there are none, or their file is damaged.
    """
    if not folder.is_dir():
        raise HeadsLoadError(
            f"no folder {folder}; give the folder that holds the heads"
        )
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        return TensorFiles(path, _indexed(path) if name in INDICES else None)
    raise HeadsLoadError(
        f"{folder} holds no heads; looked for {', '.join(WEIGHT_FILES)}"
    )


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the safetensors file ``path`` at once."""
    from safetensors.torch import save_file

    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    os.close(handle)
    try:
        whole = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        save_file(whole, name, {"format": "pt"})
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _indexed(path: Path) -> dict[str, Path]:
    places = (read_json(path) or {}).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in places.values()
    ):
        raise HeadsLoadError(
            f"{path}: weight_map must give the file, in the same folder, of each tensor"
        )
    return {name: path.parent / file for name, file in places.items()}


class _Safetensors(Mapping[str, Any]):
    """A safetensors file, each value being the file itself, to be asked by name."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file: Any = safe_open(path, "pt")
        self._names: set[str] = set(self._file.keys())  # type: ignore[no-untyped-call]

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._file

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _opened(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return _Safetensors(path)
        # Nothing but tensors is unpickled. Files of before torch 1.6 can't be mapped.
        state = torch.load(
            path,
            map_location="cpu",
            weights_only=True,
            mmap=zipfile.is_zipfile(path),
        )
    except pickle.UnpicklingError as error:
        raise HeadsLoadError(
            f"{path} holds more than tensors, or is damaged, and isn't unpickled: "
            f"{str(error).splitlines()[0]}; convert it to safetensors if you trust it"
        ) from error
    except Exception as error:  # what a damaged file raises isn't documented
        first = (str(error).splitlines() or [repr(error)])[0]
        raise HeadsLoadError(
            f"can't read {path}: {first}; fetch the file again"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in state.items()
    ):
        raise HeadsLoadError(f"{path} must hold a dictionary of tensors by name")
    return state
