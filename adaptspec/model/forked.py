"""What is left to decode with in a process that was forked from one with a model."""

from __future__ import annotations

import warnings

import torch

from adaptspec.errors import ForkedProcessError, ForkedProcessWarning
from adaptspec.turns import forks


def heed_fork(device: torch.device) -> None:
    """Go on with one thread in a forked process, since torch's others aren't there.

    OpenMP would wait for them forever. ``torch.set_num_threads`` is for the process.

    Raises:
        ForkedProcessError: if the model is on a GPU that the parent has used.
    """
    if not forks.is_child:
        return
    if device.type == "cuda" and torch.cuda._is_in_bad_fork():
        raise ForkedProcessError(
            "a GPU can't be used in a process forked from one that has used it; load "
            "the model in the child, started by multiprocessing's spawn or forkserver"
        )
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "this process was forked from one that had a model, so torch's threads "
            "aren't there: decoding runs on one (multiprocessing's spawn or forkserver "
            "give all of them)",
            ForkedProcessWarning,
            stacklevel=3,
        )
