"""Plain decoding: propose nothing, so that every forward emits one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptspec.strategy import Context, Drafter, Strategy, Target, TokenTree

if TYPE_CHECKING:
    from adaptspec.model.language_model import LanguageModel


class Autoregressive(Strategy):
    """Runs on every model: the measure of all others, and what they fall back to."""

    name = "autoregressive"
    summary = "one token per forward pass; drafts nothing"

    @classmethod
    def unavailable(
        cls, model: LanguageModel, draft: LanguageModel | None
    ) -> str | None:
        """Never."""
        return None

    def start(self, target: Target) -> Drafter:
        """Nothing to open."""
        return _Nothing()


class _Nothing(Drafter):
    def propose(self, context: Context) -> TokenTree:
        return TokenTree.root_only(context.ids[-1])
