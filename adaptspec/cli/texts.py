"""Text from the command line and standard input, and text to standard output."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import stat
import sys
from pathlib import Path
from typing import Any

import click

from adaptspec.errors import AdaptSpecError

# Beside a prompt, an open pipe on which nothing comes for so long is left out: programs
# that start others often leave theirs open.
PATIENCE_SECONDS = 5.0
WAITING = "Reading standard input until it ends"
LEFT_OUT = (
    f"Nothing came on standard input for {PATIENCE_SECONDS:g} seconds, so it is left "
    "out (`< /dev/null` saves the wait)"
)


def prompt_with_input(prompt: str | None) -> str:
    """The prompt: what is piped in, an empty line, and ``prompt``.

    Without a prompt, or where it is ``-``, standard input alone. Beside a prompt it is
    read only where it is a pipe, a socket or a file, and left out, with a line that
    says so, where nothing comes on it for a while.

    Raises:
        AdaptSpecError: if there is no text, or it isn't UTF-8.
    """
    if prompt is None or prompt == "-":
        if not _comes(sys.stdin):
            click.echo(WAITING, err=True)
        parts = [_input()]
    else:
        parts = [argument_text(prompt, "the prompt")]
        if parts[0].strip() and _is_fed(sys.stdin):
            if _comes(sys.stdin):
                parts.insert(0, _input().rstrip("\r\n"))
            else:
                click.echo(LEFT_OUT, err=True)
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise AdaptSpecError("the prompt is empty; pass it as argument or on stdin")
    return text


def argument_text(text: str, name: str) -> str:
    """An argument's text, also where the locale isn't that of its bytes.

    Raises:
        AdaptSpecError: if it isn't UTF-8.
    """
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeError as error:
        raise AdaptSpecError(f"{name} must be UTF-8 ({error}); convert it") from None


def file_text(path: str | None, name: str) -> str | None:
    """The text of an option's file; None where the option isn't given.

    Raises:
        AdaptSpecError: if it can't be read, or isn't UTF-8.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise AdaptSpecError(f"{name}: {path} can't be read: {reason}") from None


def write(text: str) -> None:
    """Write ``text`` on standard output at once.

    Raises:
        AdaptSpecError: if it can't be written. A reader that went away is no error of
            ours: click ends the command quietly.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        sys.stdout = io.StringIO()  # Python would try again at its end
        raise AdaptSpecError(
            f"can't write to standard output: {error.strerror or error}"
        ) from error


def make_printable() -> None:
    """Let output take every character, in the C locale as in others.

    There it is UTF-8, as Python's own UTF-8 mode has it; an encoding that lacks a
    character gets its code.
    """
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        ascii_only = codecs.lookup(stream.encoding).name == "ascii"
        stream.reconfigure(
            encoding="utf-8" if ascii_only else None, errors="backslashreplace"
        )


def _is_fed(stream: Any) -> bool:
    """Whether reading ``stream`` doesn't wait for someone at a terminal."""
    if stream is None:
        return False
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return True  # in memory
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _input() -> str:
    """All of standard input."""
    stream = sys.stdin
    if stream is None:
        return ""
    try:
        data = getattr(stream, "buffer", stream).read()
    except OSError:  # it can't be read at all
        return ""
    if isinstance(data, str):
        return data
    try:
        return bytes(data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AdaptSpecError(
            f"standard input must be UTF-8, got byte 0x{data[error.start]:02x} at "
            f"{error.start}; convert it, for example with iconv -f latin1 -t utf-8"
        ) from None


def _comes(stream: Any) -> bool:
    """Whether something, or the end, comes on ``stream`` within its time.

    True at a terminal, where a person is waited for.
    """
    if os.name != "posix":
        return True
    try:
        if stream.isatty():
            return True
        return bool(select.select([stream.fileno()], [], [], PATIENCE_SECONDS)[0])
    except (OSError, ValueError, AttributeError):
        return True  # in memory, or not there
