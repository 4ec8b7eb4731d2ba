"""The command and the Python lines that decode with what a run found."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PROMPT = "Your prompt"


@dataclass(frozen=True)
class Usage:
    """The options of a tune that its use needs, too, as they were given.

    Args:
        model: Folder or hub name; None is the embedded model.
        db: As given; None is the user's own database.
    """

    model: str | None = None
    draft_model: str | None = None
    heads: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str | None = None
    threads: int | None = None
    trust_remote_code: bool = False
    db: str | None = None

    def command(self) -> str:
        """One line for a POSIX shell, which works as it is.

        No class is given: the prompt's is told from its text.
        """
        words = ["adaptspec", "generate"]
        for flag, value in (
            ("--model", self.model),
            ("--draft-model", self.draft_model),
            *(("--heads", folder) for folder in self.heads),
            ("--dtype", None if self.dtype == "auto" else self.dtype),
            ("--device", self.device),
            ("--threads", self.threads),
            ("--db", self.db),
        ):
            if value is not None:
                # A value that begins with a dash is none of its own to click.
                dashed = str(value).startswith("-")
                words += [f"{flag}={value}"] if dashed else [flag, str(value)]
        if self.trust_remote_code:
            words.append("--trust-remote-code")
        return shlex.join([*words, PROMPT])

    def python(self) -> list[str]:
        """The same as lines of Python."""
        asked: dict[str, Any] = {
            "draft_model": self.draft_model,
            "db": self.db,
            "dtype": None if self.dtype == "auto" else self.dtype,
            "device": self.device,
            "threads": self.threads,
            "heads": list(self.heads) or None,
            "trust_remote_code": self.trust_remote_code or None,
        }
        given = [] if self.model is None else [repr(self.model)]
        given += [f"{k}={v!r}" for k, v in asked.items() if v is not None]
        return [
            "import adaptspec",
            f"decoder = adaptspec.load({', '.join(given)})",
            f"print(decoder.generate({PROMPT!r}).text)",
        ]

    def as_json(self) -> dict[str, Any]:
        """As kept with the run."""
        return {**asdict(self), "heads": list(self.heads)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Usage:
        """What :meth:`as_json` gave; what another version wrote beside is left out."""
        known = {k: v for k, v in record.items() if k in cls.__dataclass_fields__}
        return cls(**{**known, "heads": tuple(known.get("heads", ()))})
