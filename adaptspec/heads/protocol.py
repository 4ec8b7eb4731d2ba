"""The protocol of trained heads in the core: their kind, name and fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol


class TrainedHeads(Protocol):
    """Heads that a plugin read for one target; its strategies know what is in them.

    They may have ``nbytes``, too: what their weights take of memory, see
    :func:`bytes_of`.
    """

    @property
    def kind(self) -> str:
        """Kind of the heads, such as ``medusa``; a model has one of each at most."""

    @property
    def name(self) -> str:
        """Name to be shown."""

    @property
    def digest(self) -> str:
        """Fingerprint of everything in them that decides speed."""


def bytes_of(heads: TrainedHeads) -> int:
    """Memory of the heads' weights: ``nbytes``, or 0 if they have no such attribute."""
    return int(getattr(heads, "nbytes", None) or 0)


def digest_of(heads: Iterable[TrainedHeads]) -> str | None:
    """One fingerprint of all heads of a model, None without any."""
    known = sorted((one.kind, one.digest) for one in heads)
    if not known:
        return None
    if len(known) == 1:
        return known[0][1]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def name_of(heads: Iterable[TrainedHeads]) -> str | None:
    """The heads' names, None without any."""
    return ", ".join(sorted(one.name for one in heads)) or None
