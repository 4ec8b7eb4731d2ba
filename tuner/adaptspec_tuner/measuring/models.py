"""Loads what a tune measures with, here and on a cluster's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptspec.decoding.engine import Engine
    from adaptspec.host import Host
    from adaptspec.model.language_model import LanguageModel


@dataclass(frozen=True)
class Models:
    """Where the models come from.

    Args:
        target: A folder, hub name, loaded model or ``LanguageModel``.
        draft: The same, or None.
        heads: Folders of heads trained for the target.
        trust_remote_code: Whether code that comes with the models may run.
        compile: Whether their norms and MLPs run as ``torch.compile`` makes them.
    """

    target: Any
    draft: Any = None
    heads: Sequence[Path | str] = ()
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    compile: bool = False

    @property
    def are_paths(self) -> bool:
        """Whether another process can load them, too."""
        sources = (self.target, self.draft)
        return all(s is None or isinstance(s, str | Path) for s in sources)

    def as_text(self) -> Models:
        """The same paths, as what any machine reads."""
        return replace(
            self,
            target=str(self.target),
            draft=None if self.draft is None else str(self.draft),
            heads=[str(folder) for folder in self.heads],
        )

    def engine(self, host: Host) -> Engine:
        """Load them, as fast as they go and with the heads."""
        from adaptspec.decoding.engine import Engine

        target = self._loaded(self.target)
        for folder in self.heads:
            target.attach(host.open_heads(folder, target))
        return Engine(target, None if self.draft is None else self._loaded(self.draft))

    def untouched(self) -> tuple[LanguageModel, LanguageModel | None]:
        """Load target and draft as other engines would."""
        return (
            self._loaded(self.target, accelerate=False),
            None if self.draft is None else self._loaded(self.draft, accelerate=False),
        )

    def _loaded(self, source: Any, accelerate: bool = True) -> LanguageModel:
        from adaptspec.model.language_model import LanguageModel
        from adaptspec.model.loading import load_model

        if isinstance(source, LanguageModel):
            return source
        return load_model(
            source,
            dtype=self.dtype,
            device=self.device,
            accelerate=accelerate,
            trust_remote_code=self.trust_remote_code,
            compile=self.compile and accelerate,
        )
