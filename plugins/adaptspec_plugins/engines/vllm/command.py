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
VISIBLE = "CUDA_VISIBLE_DEVICES"
BOUND = "VLLM_CPU_OMP_THREADS_BIND"
# Of a server beside weights and cache: Python, torch, compiled code, buffers.
SERVER_BYTES = 2 * GIB
MEMORY_USED = 0.7  # of what is free
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
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
        # Both are told for two bytes an element.
        needed = needed * ELEMENT_BYTES.get(self.dtype, 2) // 2
        return max(1, math.ceil(needed / GIB)) * GIB

    @property
    def bytes(self) -> int:
        """Of memory that a server takes, about."""
        weights = self.target.bytes + self.drafter_bytes
        computed, stored = (
            ELEMENT_BYTES.get(name) for name in (self.dtype, self.target.dtype)
        )
        if computed and stored:
            weights = weights * computed // stored
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

        All models are at hand, so the hub isn't asked. On a CPU vLLM 0.32 writes a
        compiled model that it can't read again, so every start would compile anew;
        compiled the other way, a start finds what an earlier one left.
        """
        told = {"HF_HUB_OFFLINE": "1"}
        if self.on_cpu:
            told["VLLM_USE_AOT_COMPILE"] = "0"
            told["VLLM_CPU_KVCACHE_SPACE"] = str(self.cache_bytes // GIB)
            if self.cores:
                told[BOUND] = ",".join(map(str, self.cores))
                told["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        # What the user has set goes before.
        told = {name: os.environ.get(name, value) for name, value in told.items()}
        if (device := visible_device(self.options)) is not None:
            told[VISIBLE] = device
        return told


def visible_device(options: EngineOptions) -> str | None:
    """The one that ``--device cuda:N`` names, of those that the user lets programs see.

    Raises:
        EngineError: where it is no number, or there are fewer and it is to run on this
            machine.
    """
    _, colon, number = (options.device or "").partition(":")
    if not colon:
        return None
    if not number.isdecimal():
        raise EngineError(
            f"a device is cuda or cuda:N with a number, got {options.device!r}"
        )
    if not (seen := os.environ.get(VISIBLE)):
        return number
    names = [name.strip() for name in seen.split(",")]
    if int(number) >= len(names):
        if not options.runs_here:
            return number
        raise EngineError(
            f"{VISIBLE}={seen} shows {len(names)} devices, got {options.device!r}; "
            "give a smaller number, or unset the variable"
        )
    return names[int(number)]


def usable_cpus() -> list[int]:
    """Those that this process may use; empty where the system doesn't tell."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))


def cores_of(options: EngineOptions) -> tuple[int, ...]:
    """CPUs that this process may use, as many as there are to be threads.

    Raises:
        EngineError: where there are fewer and it is to run on this machine. On another
            one they are the first.
    """
    if not (allowed := usable_cpus()):
        return ()
    wanted = options.threads or len(allowed)
    if wanted > len(allowed) and not options.runs_here:
        return tuple(range(wanted))
    if not 1 <= wanted <= len(allowed):
        raise EngineError(
            f"threads must be 1..{len(allowed)}, the CPUs that this process may use, "
            f"got {wanted}"
        )
    return tuple(allowed[:wanted])
