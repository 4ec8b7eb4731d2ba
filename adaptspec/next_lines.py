"""The command and the Python lines that use what a tune found."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EXAMPLE = "Why is the sky blue?"


@dataclass(frozen=True)
class NextLines:
    """Lines that can be typed as they are.

    Args:
        command: For a shell.
        python: For a program or a notebook.
    """

    command: str
    python: tuple[str, ...]


def next_lines(
    model: Path | str | None = None,
    draft_model: Path | str | None = None,
    *,
    heads: Sequence[Path | str] = (),
    db: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    raw: bool = False,
    prompt: str = EXAMPLE,
) -> NextLines:
    """How to decode ``prompt`` by what a tune with these options found.

    Profiles hold for one model, draft model, heads, dtype, device and number of
    threads; each is named that isn't the default. No class is: it is told from the
    prompt, or the choice over all classes is used.

    Args:
        model: As it was given to ``tune``; None: the embedded model.
        db: None: the user's own database.
        raw: Whether prompts are read without the chat template.
    """
    named: list[tuple[str, object]] = [
        ("model", model),
        ("draft_model", draft_model),
        *(("heads", folder) for folder in heads),
        ("db", db),
        ("dtype", None if dtype == "auto" else dtype),
        ("device", device),
        ("threads", threads),
    ]
    words = ["adaptspec", "generate"]
    for name, value in named:
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--trust-remote-code"] * trust_remote_code + ["--raw"] * raw
    if prompt.startswith("-"):
        words.append("--")
    given: dict[str, object] = {
        name: value if isinstance(value, int) else str(value)
        for name, value in named
        if value is not None
    }
    if heads:
        given["heads"] = [str(folder) for folder in heads]
    arguments = [f"{name}={value!r}" for name, value in given.items()]
    if trust_remote_code:
        arguments.append("trust_remote_code=True")
    return NextLines(
        shlex.join([*words, prompt]),
        (
            "import adaptspec",
            f"decoder = adaptspec.load({', '.join(arguments)})",
            f"result = decoder.generate({prompt!r}{', raw=True' if raw else ''})",
            "print(result.text, result.choice.reason)",
        ),
    )
