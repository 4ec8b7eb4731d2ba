"""What an installed ``llama-server`` is, and which options it knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from adaptspec.errors import EngineError

DEFAULT_COMMAND = "llama-server"
HOW_TO_GET_IT = (
    "get it from https://github.com/ggml-org/llama.cpp (releases, or built with "
    "`cmake --build build --target llama-server`), and put it on the path or name it "
    "with --engine-command"
)
ANSWER_SECONDS = 60
# Libraries for products on the CPU, which llama.cpp lists as devices.
ON_THE_CPU = ("BLAS", "ZenDNN")
OPTION = re.compile(r"--?[a-zA-Z][\w-]*")
NAMES = re.compile(rf"(?:{OPTION.pattern}(?:,\s*)?)+")
SPEC_TYPES = re.compile(r"^--spec-type\s+\[?([\w,|-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Program:
    """A ``llama-server`` that answered when it was asked what it is.

    Args:
        command: As the user named it, ``~`` in full.
        version: What it calls itself, e.g. ``4589 (9f7f5d0)``.
        options: Those that its ``--help`` lists and doesn't call removed.
        spec_types: What ``--spec-type`` takes.
        devices: Name (``CUDA0``) and description of each accelerator that it can use.
    """

    command: str
    version: str
    options: frozenset[str]
    spec_types: frozenset[str]
    devices: tuple[tuple[str, str], ...]

    @classmethod
    def find(cls, command: str | None) -> Program:
        """Ask a program what it is.

        Args:
            command: Its name or path; None: ``llama-server`` on the path.

        Raises:
            EngineError: where there is none, or it is another one.
        """
        command = os.path.expanduser(command or DEFAULT_COMMAND)
        if shutil.which(command) is None:
            raise EngineError(f"llama.cpp: no program {command!r}; {HOW_TO_GET_IT}")
        text = _ask(command, "--help")
        options = options_of(text)
        if not {"-m", "--port"} <= options:
            raise EngineError(
                f"llama.cpp: {command!r} is no llama-server: its --help lists neither "
                f"-m nor --port; {HOW_TO_GET_IT}"
            )
        told = _ask(command, "--version")
        version = re.search(r"^version:\s*(.+?)\s*$", told, re.MULTILINE)
        types = SPEC_TYPES.search(text)
        return cls(
            command=command,
            version=version.group(1) if version else "unknown",
            options=options,
            spec_types=frozenset(re.split(r"[,|]", types.group(1)) if types else ()),
            devices=devices_of(_ask(command, "--list-devices"))
            if "--list-devices" in options
            else (),
        )


def dropped_variables() -> list[str]:
    """Variables of this process that would be options of a server beside ours."""
    return sorted(
        name
        for name in os.environ
        if name.startswith("LLAMA_ARG_") or name == "LLAMA_API_KEY"
    )


def variables() -> dict[str, str]:
    """Those that a program is started with: of this process, without options."""
    dropped = dropped_variables()
    return {name: text for name, text in os.environ.items() if name not in dropped}


def options_of(help_text: str) -> frozenset[str]:
    """The options that a ``--help`` lists, without those that it calls removed."""
    found: set[str] = set()
    # An option's lines: from one that starts with a dash to the next one.
    for part in re.split(r"^(?=-)", help_text, flags=re.MULTILINE):
        names = NAMES.match(part)
        if names and "has been removed" not in part:
            found.update(OPTION.findall(names.group()))
    return frozenset(found)


def devices_of(listed: str) -> tuple[tuple[str, str], ...]:
    """Name and description of each accelerator that ``--list-devices`` prints."""
    found = re.findall(r"^\s+(\w+): (.+?)(?: \(\d+ MiB.*)?$", listed, re.MULTILINE)
    return tuple(
        (name, description) for name, description in found if name not in ON_THE_CPU
    )


def _ask(command: str, option: str) -> str:
    try:
        done = subprocess.run(
            [command, option],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
            stdin=subprocess.DEVNULL,
            env=variables(),
        )
    except OSError as error:
        raise EngineError(f"llama.cpp: can't run {command!r}: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"llama.cpp: `{command} {option}` said nothing within {ANSWER_SECONDS} s"
        ) from error
    printed = done.stdout + done.stderr
    if done.returncode != 0:
        last = " | ".join(line for line in printed.splitlines() if line.strip())[-400:]
        raise EngineError(
            f"llama.cpp: `{command} {option}` failed with {done.returncode}: {last}"
        )
    return printed
