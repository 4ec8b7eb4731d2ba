"""State that a model keeps in its modules, kept apart for each sequence.

A few models (RecurrentGemma) hold a layer's state in an attribute in place of the
cache, so that two sequences decoded in turns would take each other's. The attributes
that a forward pass leaves changed are found by watching, and exchanged whenever another
sequence goes on.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from adaptspec.acceleration.linear import NativeLinear
from adaptspec.acceleration.packed import PackedEmbedding, PackedLinear
from adaptspec.errors import SequenceStateError

MOST_COPIED = 1 << 18  # bytes of a tensor whose first value is kept, if it is changed
_COMMON = frozenset(nn.Module().__dict__)
# Of a large model's modules most; nothing that they hold changes with a pass.
_STATELESS = (nn.Linear, nn.Embedding, NativeLinear, PackedLinear, PackedEmbedding)


def _no_sequence() -> None:
    """The last pass belonged to no sequence."""


class _Slot:
    """An attribute that may hold state, and what it held before any pass."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.begin()

    def begin(self) -> None:
        """Take what it holds now for what every sequence begins with."""
        value = self.value
        self._original, self._unchanged = value, _version(value)
        self._copy = value.detach().clone() if _is_small(value) else None
        self.see()

    def see(self) -> None:
        """Ask for later changes only."""
        self._seen, self._version = self.value, _version(self.value)

    @property
    def value(self) -> Any:
        """What it holds now."""
        return getattr(self.module, self.name, None)

    def put(self, value: Any) -> None:
        """Let it hold ``value``."""
        setattr(self.module, self.name, value)
        self.see()

    def changed(self) -> bool:
        """Whether it was assigned or written to since it was last seen."""
        now = self.value
        if now is self._seen:
            return _version(now) != self._version
        if isinstance(now, torch.Tensor) or isinstance(self._seen, torch.Tensor):
            return True
        return bool(now != self._seen)

    @property
    def untouched(self) -> bool:
        """Whether it is as it was at the beginning."""
        return self.value is self._original and _version(self.value) == self._unchanged

    @property
    def is_lost(self) -> bool:
        """Whether its first value is lost."""
        return self._copy is None and _version(self._original) != self._unchanged

    def first(self) -> Any:
        """What it held before any pass, as an object of its own."""
        if self._copy is None:
            return self._original
        with torch.inference_mode(False):  # or nobody else could write to it
            return self._copy.clone()


class ModuleState:
    """The states of the sequences that one module tree decodes.

    Args:
        module: The tree; nothing may have been decoded with it yet.
        name: What people call the model.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._name = name
        self._lock = threading.RLock()
        self._watched = [
            _Slot(owner, attribute)
            for owner in module.modules()
            for attribute in _candidates(owner)
        ]
        self._slots: list[_Slot] = []
        self._saved: weakref.WeakKeyDictionary[Any, list[Any]] = (
            weakref.WeakKeyDictionary()
        )
        self._running: Callable[[], Any] = _no_sequence  # whose state the modules hold
        self.settled = False  # whether learn was called

    def learn(self, passes: Iterable[object]) -> None:
        """Find what holds state by ``passes`` over one sequence, three or more.

        What only the first of them changes was set up once, and belongs to all.
        """
        with self._lock:
            if self.settled:
                return
            changed: set[_Slot] = set()
            # A pass that fails is for the caller to find out.
            with contextlib.suppress(Exception):
                for _ in passes:
                    changed = {slot for slot in self._watched if slot.changed()}
                    for slot in changed:
                        slot.see()
            for slot in list(self._watched):
                if slot in changed:
                    self._watched.remove(slot)
                    self._slots.append(slot)
                    if not slot.is_lost:
                        slot.put(slot.first())
                elif not slot.untouched:
                    slot.begin()
            self.settled = True  # only now may other threads go on

    @contextlib.contextmanager
    def of(self, cache: Any) -> Iterator[None]:
        """Inside, the modules hold the state of the sequence with that ``cache``.

        None is a pass by itself. Others wait, where there is state.

        Raises:
            SequenceStateError: if the state of another sequence can't be put aside.
        """
        with self._lock if self._slots else _FREE:
            if self._slots:
                self._exchange(cache)
            try:
                yield
            finally:
                self._running = _no_sequence if cache is None else weakref.ref(cache)
                self._notice()

    def _exchange(self, cache: Any) -> None:
        running = self._running()
        if running is not None and running is cache:
            return
        if running is not None:
            self._saved[running] = [slot.value for slot in self._slots]
        values = [] if cache is None else self._saved.pop(cache, [])
        # One that was found later held its first value then.
        for slot in self._slots[len(values) :]:
            if slot.is_lost and running is not None:
                raise SequenceStateError(
                    f"{self._name} writes to {slot.name} of "
                    f"{type(slot.module).__name__}, so only one sequence can be "
                    "decoded at a time; finish or close the other stream first, or "
                    "load the model once more"
                )
        for index, slot in enumerate(self._slots):
            if index < len(values):
                slot.put(values[index])
            elif not slot.is_lost:
                slot.put(slot.first())

    def _notice(self) -> None:
        """Attributes that a pass changed hold state from now on."""
        for slot in [slot for slot in self._watched if slot.changed()]:
            self._watched.remove(slot)
            self._slots.append(slot)


_FREE = contextlib.nullcontext()


def _candidates(module: nn.Module) -> Iterator[str]:
    """Names of attributes that could hold state."""
    if type(module) in _STATELESS:
        return
    tensors = [name for name, value in module._buffers.items() if value is not None]
    numbers = []
    for name, value in module.__dict__.items():
        if name in _COMMON:
            continue
        if value is None or isinstance(value, torch.Tensor):
            tensors.append(name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers.append(name)
    yield from tensors
    if tensors:
        yield from numbers


def _is_small(value: Any) -> bool:
    return type(value) is torch.Tensor and value.nbytes <= MOST_COPIED


def _version(value: Any) -> int:
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return -1
    return value._version
