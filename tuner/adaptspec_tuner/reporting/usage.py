"""The command and the Python lines that decode with what a run found."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from adaptspec.profile import OURS

if TYPE_CHECKING:
    from adaptspec_tuner.options import TuneOptions

PROMPT = "Your prompt"


@dataclass(frozen=True)
class Usage:
    """The options of a tune that its use needs, too, as they were given.

    Args:
        model: Folder or hub name; None is the embedded model.
        db: As given; None is the user's own database.
        engine: A name or URL.
        starts: Whether the engine is started with flags, which an export prints.
        compile: Whether norms and MLPs ran as ``torch.compile`` makes them.
        allow_lossy: Whether strategies that change sampled output were measured, too.
        controls: Generation controls that were measured under, as ``generate`` of a
            :class:`~adaptspec.decoder.Decoder` takes them; greedily if empty.
    """

    model: str | None = None
    draft_model: str | None = None
    heads: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str | None = None
    threads: int | None = None
    trust_remote_code: bool = False
    db: str | None = None
    engine: str = OURS
    engine_command: str | None = None
    engine_python: str | None = None
    engine_argument: tuple[str, ...] = ()
    batch_threads: int | None = None
    context: int | None = None
    concurrency: int = 1
    starts: bool = False
    allow_lossy: bool = False
    compile: bool = False
    controls: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: str | None,
        draft_model: str | None,
        options: TuneOptions,
        db: str | None,
        starts: bool = False,
    ) -> Usage:
        """Of a tune with these options."""
        return cls(
            *(model, draft_model, tuple(map(str, options.heads)), options.dtype),
            *(options.device, options.threads, options.trust_remote_code, db),
            engine=options.engine,
            engine_command=options.engine_command,
            engine_python=options.engine_python,
            engine_argument=tuple(options.engine_argument),
            batch_threads=options.batch_threads,
            context=options.context,
            concurrency=options.concurrency,
            starts=starts,
            allow_lossy=options.allow_lossy,
            compile=options.compile,
            controls=options.controls,
        )

    @property
    def ours(self) -> bool:
        """Whether our own engine decodes."""
        return self.engine == OURS

    def export(self) -> str:
        """One line for a POSIX shell that prints how to start the engine with what was
        found; empty where it isn't started with flags."""
        if not self.starts:
            return ""
        words = ["adaptspec", "export", "--for", self.engine]
        for flag, value in (
            ("--model", self.model),
            ("--draft-model", self.draft_model),
            *(("--heads", folder) for folder in self.heads),
            ("--db", self.db),
            # Always: other numbers may be measured, too, and the export won't guess.
            ("--concurrency", self.concurrency),
        ):
            if value is not None:
                dashed = str(value).startswith("-")
                words += [f"{flag}={value}"] if dashed else [flag, str(value)]
        return shlex.join(words)

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
        if self.allow_lossy:
            words.append("--allow-lossy")
        if self.compile:
            words.append("--compile")
        for name, value in self.controls.items():
            said = json.dumps(value, ensure_ascii=False)
            if name in ("temperature", "top_k", "top_p") and value is not None:
                words += [f"--{name.replace('_', '-')}", said]
            else:
                words += ["--control", name, said]
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
            "allow_lossy": self.allow_lossy or None,
            "compile": self.compile or None,
        }
        given = [] if self.model is None else [repr(self.model)]
        given += [f"{k}={v!r}" for k, v in asked.items() if v is not None]
        asks = [repr(PROMPT), *(f"{k}={v!r}" for k, v in self.controls.items())]
        return [
            "import adaptspec",
            f"decoder = adaptspec.load({', '.join(given)})",
            f"print(decoder.generate({', '.join(asks)}).text)",
        ]

    def as_json(self) -> dict[str, Any]:
        """As kept with the run."""
        told = asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in told.items()
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Usage:
        """What :meth:`as_json` gave; what another version wrote beside is left out."""
        known = {k: v for k, v in record.items() if k in cls.__dataclass_fields__}
        for name in ("heads", "engine_argument"):
            known[name] = tuple(known.get(name, ()))
        return cls(**known)
