"""How vLLM's server is started with a setting: its program, options and variables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.errors import EngineError
from adaptspec_plugins.engines.model_folder import ModelFolder
from adaptspec_plugins.engines.vllm.installation import Installation

GIB = 2**30
# Of a server beside weights and cache: Python, torch, compiled code, buffers.
SERVER_BYTES = 2 * GIB
# Logits with `logprobs`, and nothing in the log but errors. Neither changes an answer
# or its speed, so a user's server is started without them.
MEASURED_ALONE = ("--logprobs-mode", "raw_logits", "--disable-uvicorn-access-log")


@dataclass(frozen=True)
class Starting:
    """What all settings of a model are started with.

    Args:
        cores: CPUs that its threads are bound to; empty on another device.
    """

    options: EngineOptions
    installation: Installation
    target: ModelFolder
    drafter_bytes: int
    drafter_cache_bytes: int
    cores: Sequence[int]

    @property
    def on_cpu(self) -> bool:
        """Whether weights, cache and threads share the machine with others."""
        return self.installation.device == "cpu"

    @property
    def dtype(self) -> str:
        """What it computes in."""
        told = self.options.dtype
        return (self.target.dtype or "auto") if told == "auto" else told

    @property
    def context(self) -> int:
        """Positions of the longest sequence.

        Raises:
            EngineError: where neither user nor model tell.
        """
        told = self.options.context or self.target.longest
        if told is None:
            raise EngineError(
                f"{self.target.given}: its configuration tells no longest context; "
                "give one by --context"
            )
        return told

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all requests at a time, at their longest; whole GiB."""
        tokens = self.context * self.options.concurrency
        needed = self.target.cache_bytes(tokens) + self.drafter_cache_bytes * tokens
        return max(1, math.ceil(needed / GIB)) * GIB

    @property
    def bytes(self) -> int:
        """Of memory that a server takes, about."""
        weights = self.target.bytes + self.drafter_bytes
        return weights + self.cache_bytes + SERVER_BYTES

    def command(self, config: Mapping[str, Any]) -> list[str]:
        """Program and options, without address and port.

        Args:
            config: Of speculation; empty: none.
        """
        options = self.options
        command = [
            *self.installation.program,
            self.target.given,
            *("--dtype", self.dtype),
            *("--max-num-seqs", str(options.concurrency)),
            "--no-enable-prefix-caching",
        ]
        if options.context is not None:
            command += ["--max-model-len", str(options.context)]
        if options.trust_remote_code:
            command.append("--trust-remote-code")
        if config:
            command += ["--speculative-config", json.dumps(config)]
        return [*command, *options.arguments]

    def measured(self, config: Mapping[str, Any], port: int) -> list[str]:
        """The same with a port of loopback, and what a user's server goes without."""
        command = self.command(config)
        at = len(self.installation.program) + 1
        address = ("--host", "127.0.0.1", "--port", str(port))
        # A user's own arguments come last, where they have the last word.
        return [*command[:at], *address, *MEASURED_ALONE, *command[at:]]

    def variables(self) -> dict[str, str]:
        """Those that a user's server needs as well.

        All models are at hand, so the hub isn't asked.
        """
        told = {"HF_HUB_OFFLINE": "1"}
        if self.on_cpu:
            told["VLLM_CPU_KVCACHE_SPACE"] = str(self.cache_bytes // GIB)
            if self.cores:
                told["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, self.cores))
                told["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        elif ":" in (device := self.options.device or ""):
            told["CUDA_VISIBLE_DEVICES"] = device.partition(":")[2]
        # What the user has set goes before.
        return {name: os.environ.get(name, value) for name, value in told.items()}


def cores_of(options: EngineOptions) -> tuple[int, ...]:
    """CPUs that this process may use, as many as there are to be threads.

    Raises:
        EngineError: where there are fewer.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    wanted = options.threads or len(allowed)
    if not 1 <= wanted <= len(allowed):
        raise EngineError(
            f"threads must be 1..{len(allowed)}, the CPUs that this process may use, "
            f"got {wanted}"
        )
    return tuple(allowed[:wanted])


def free_bytes() -> int:
    """Of memory that programs may still take."""
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)
