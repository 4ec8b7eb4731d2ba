"""What strategies learn across requests, kept in a file per model and strategy."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptspec.errors import KnowledgeError, StoreWarning, stopped_by_user

if TYPE_CHECKING:
    import torch

    from adaptspec.strategy import Strategy

InTurn = Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]

FORMAT = "adaptspec-knowledge-1"
LOCK_SECONDS = 30.0
EVERY_SECONDS = 60.0


def _at_once(merge: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return merge()


class KnowledgeWarning(StoreWarning):
    """A knowledge file can't be used and is replaced; decoding goes on without it."""


class KnowledgeFile:
    """One strategy's knowledge of one model; several processes may share it.

    Every exchange is read, merge and atomic replacement under a lock, so that a process
    killed at any moment leaves either the old file or the new one.

    Args:
        folder: Where the files of all models are.
        model: Digest of the target.
        strategy: Its name is the file's, its ``knowledge`` the version.
    """

    def __init__(self, folder: Path, model: str, strategy: type[Strategy]) -> None:
        self.path = folder / model / f"{strategy.name}.safetensors"
        self._wanted = {
            "format": FORMAT,
            "model": model,
            "strategy": strategy.name,
            "version": str(strategy.knowledge),
        }

    def exchange(
        self, strategy: Strategy, in_turn: InTurn = _at_once, wait: bool = True
    ) -> bool:
        """Merge the file into ``strategy`` and write what it then knows.

        Args:
            in_turn: Runs what it is given while nobody decodes with the strategy.
                Reading and writing the file keeps nobody from it.
            wait: Whether to wait where another process or thread has the file.

        Returns:
            Whether it was done.

        Raises:
            KnowledgeError: if the folder can't be written or stays locked.
        """
        from filelock import FileLock, Timeout

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            seconds = LOCK_SECONDS if wait else 0.0
            with FileLock(f"{self.path}.lock", timeout=seconds):
                stored = self._read()
                self._write(in_turn(lambda: self._merged(strategy, stored)))
            return True
        except Timeout:
            if not wait:
                return False
            raise KnowledgeError(
                f"{self.path} is locked by another process for {LOCK_SECONDS:g} s; "
                "what was learnt is kept in memory (without learn=True nothing is kept)"
            ) from None
        # A file system without locks says so in an error of its own.
        except (OSError, NotImplementedError) as error:
            raise KnowledgeError(
                f"can't write {self.path}: {error}; make the folder writable or "
                "leave out learn=True"
            ) from error

    def _merged(
        self, strategy: Strategy, stored: dict[str, torch.Tensor] | None
    ) -> dict[str, Any]:
        """What it knows and the file holds, in tensors that no step writes to."""
        import torch

        known = self._synced(strategy, stored)
        whole = torch.contiguous_format
        return {name: x.clone(memory_format=whole) for name, x in known.items()}

    def _synced(
        self, strategy: Strategy, stored: dict[str, torch.Tensor] | None
    ) -> dict[str, Any]:
        if stored is None:
            return strategy.sync(None)
        try:
            return strategy.sync(stored)
        # Whole, and still not what the strategy writes: it may stumble over anything.
        except Exception as error:
            if stopped_by_user(error):
                raise
            self._refuse(f"it can't be taken in ({type(error).__name__}: {error})")
            return strategy.sync(None)

    def _read(self) -> dict[str, torch.Tensor] | None:
        """The tensors of a whole file of this model, strategy and version, or None."""
        if not self.path.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            self._refuse(f"it is damaged ({error})")
            return None
        problem = next(
            (
                f"its {key} is {metadata.get(key)!r}, not {value!r}"
                for key, value in self._wanted.items()
                if metadata.get(key) != value
            ),
            None,
        )
        if problem is None and metadata.get("checksum") != _checksum(tensors):
            problem = "it is damaged (wrong checksum)"
        if problem is not None:
            self._refuse(problem)
            return None
        return tensors

    def _refuse(self, reason: str) -> None:
        warnings.warn(
            f"{self.path} is not used and will be replaced: {reason}",
            KnowledgeWarning,
            stacklevel=4,
        )

    def _write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {**self._wanted, "checksum": _checksum(tensors)}
        payload = save(tensors, metadata)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _checksum(tensors: Mapping[str, Any]) -> str:
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        octets = tensor.contiguous().reshape(-1).view(torch.uint8)
        digest.update(octets.numpy().tobytes())
    return digest.hexdigest()


class KnowledgeKeeper:
    """Exchanges the knowledge of a program's strategies with their files.

    Trouble with a file is a warning, said once: decoding doesn't depend on it.

    Args:
        folder: Where the files are.
        model: Digest of the target.
        clock: Seconds, for :meth:`refresh`.
        in_turn: See :meth:`KnowledgeFile.exchange`.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        clock: Callable[[], float] = time.monotonic,
        in_turn: InTurn = _at_once,
    ) -> None:
        self._folder, self._model, self._clock = folder, model, clock
        self._in_turn = in_turn
        self._kept: list[tuple[Strategy, KnowledgeFile]] = []
        self._last = clock()
        self._told = False

    def adopt(self, strategy: Strategy) -> None:
        """Load a strategy's file, and save what it learns from now on."""
        if strategy.knowledge > 0:
            file = KnowledgeFile(self._folder, self._model, type(strategy))
            if self._exchange(strategy, file):
                self._kept.append((strategy, file))

    def refresh(self) -> None:
        """:meth:`save` if the last exchange is ``EVERY_SECONDS`` old.

        A file that another process or thread has just now is left for the next time.
        """
        if self._kept and self._clock() - self._last >= EVERY_SECONDS:
            self.save(wait=False)

    def save(self, wait: bool = True) -> None:
        """Merge and write all files now."""
        for strategy, file in self._kept:
            self._exchange(strategy, file, wait)
        self._last = self._clock()

    def _exchange(
        self, strategy: Strategy, file: KnowledgeFile, wait: bool = True
    ) -> bool:
        try:
            return file.exchange(strategy, self._in_turn, wait)
        except KnowledgeError as error:
            if not self._told:
                warnings.warn(str(error), KnowledgeWarning, stacklevel=4)
                self._told = True
            return False
