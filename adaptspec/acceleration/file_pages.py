"""Giving back memory of a mapped weights file once a tensor of it isn't read again."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch

MAPPED_FILES = Path("/proc/self/maps")


class FilePages:
    """The weights files that this process has mapped now.

    A mapped page counts as this process's memory from its first read on, until the
    whole file is unmapped. Elsewhere than on Linux nothing is given back.
    """

    def __init__(self) -> None:
        self._mapped: list[tuple[int, int]] = []
        self._libc: ctypes.CDLL | None = None
        if sys.platform != "linux":
            return
        try:
            lines = MAPPED_FILES.read_text().splitlines()
            self._libc = ctypes.CDLL(None, use_errno=True)
        except OSError:
            return
        for line in lines:
            # address range, permissions, offset, device, inode, path
            span, permissions, *rest = line.split(maxsplit=5)
            if len(rest) == 4 and rest[2] != "0" and permissions.endswith("p"):
                first, last = span.split("-")
                self._mapped.append((int(first, 16), int(last, 16)))

    def give_back(self, storage: torch.UntypedStorage) -> bool:
        """Drop the pages of ``storage`` from memory, if it lies in a mapped file.

        Nobody may read it again: what was written over the file's content is lost.
        Pages that it shares with its neighbours stay.
        """
        first = storage.data_ptr()
        last = first + storage.nbytes()
        page = mmap.PAGESIZE
        inner = -(-first // page) * page, last // page * page
        if self._libc is None or inner[0] >= inner[1]:
            return False
        if not any(low <= first and last <= high for low, high in self._mapped):
            return False
        done = self._libc.madvise(
            ctypes.c_void_p(inner[0]),
            ctypes.c_size_t(inner[1] - inner[0]),
            mmap.MADV_DONTNEED,
        )
        return int(done) == 0
