"""A computation of fixed shapes as a CUDA graph: captured once, replayed as one call.

While it is captured nothing may wait for the device or allocate outside of the graph's
pool, so it is run a few times before, on a stream of its own: libraries then have what
they set up once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")


class Captured(Generic[Result]):
    """What ``compute`` launches, as a graph.

    It reads and writes the addresses that it had when it was captured, and nothing that
    Python decides in it is decided again.

    Args:
        pool: Of ``torch.cuda.graph_pool_handle``, shared by graphs that are never
            replayed at the same time.
        warm_up_runs: Times that it runs before, whose results are the same.

    Raises:
        RuntimeError: if it can't be captured.
    """

    def __init__(
        self,
        compute: Callable[[], Result],
        device: torch.device,
        pool: Any,
        warm_up_runs: int = 2,
    ) -> None:
        with torch.cuda.device(device):
            here = torch.cuda.current_stream(device)
            aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(warm_up_runs):
                    compute()
            here.wait_stream(aside)
            torch.cuda.synchronize(device)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device meanwhile.
            with torch.cuda.graph(
                self._graph,
                pool=pool,
                stream=aside,
                capture_error_mode="thread_local",
            ):
                self._result = compute()

    def replay(self) -> Result:
        """Launch it; the result is overwritten by the next replay of its pool."""
        self._graph.replay()
        return self._result
