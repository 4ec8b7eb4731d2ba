"""A model with another tokenizer drafts: by its text, or by the tokens both have.

Re-encoding each other's text is transformers' universal assisted generation;
restricting the draft's distribution to the shared tokens is the token-level
intersection of Timor et al. 2025, arXiv:2502.05202.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from adaptspec.params import DraftingParams, Tunable
from adaptspec.strategy import (
    Context,
    Continuation,
    Drafter,
    Drawn,
    Requirements,
    Strategy,
    Target,
    TokenTree,
    reading_from,
)
from adaptspec_plugins.universal_draft.vocabularies import (
    LOOKBEHIND,
    DraftTokens,
    complete,
    pair,
)

if TYPE_CHECKING:
    from adaptspec.model.cache import TreeCache
    from adaptspec.model.language_model import LanguageModel


class UniversalDraftParams(DraftingParams):
    """Both keep the target's distribution; ``text`` plain sampling's tokens, too."""

    mode: Annotated[Literal["text", "intersection"], Tunable()] = Field(
        default="text",
        description="re-encode the draft's text, or draft only tokens that both have",
    )
    draft_length: Annotated[int, Tunable(1, 8)] = Field(
        default=4, ge=1, le=12, description="most of the draft model's tokens in a step"
    )
    stop: Annotated[float, Tunable(0.0, 0.9, step=0.1)] = Field(
        default=0.0,
        ge=0.0,
        le=0.9,
        description="stop after a token the draft gives less probability than this",
    )


class UniversalDraft(Strategy):
    """Pays where the only fast draft model has another tokenizer."""

    name = "universal_draft"
    summary = "a model with another tokenizer drafts a chain"
    reference = "arXiv:2502.05202"
    Params = UniversalDraftParams
    requires = Requirements(draft="another tokenizer")
    replays = True
    params: UniversalDraftParams

    @classmethod
    def unavailable(
        cls, model: LanguageModel, draft: LanguageModel | None
    ) -> str | None:
        """Also where the draft's tokens are the target's: other strategies do more."""
        if reason := super().unavailable(model, draft):
            return reason
        if draft is None:
            return (
                "needs a draft model with another tokenizer, none was given "
                "(--draft-model)"
            )
        for each in (model, draft):
            if each.tokenizer is None:
                return f"needs both models' tokenizers: {each.name} has none"
        try:
            pairing = pair(model, draft)
        except (AttributeError, TypeError, ValueError) as error:
            # Tokenizers of other libraries come in under the same attribute.
            return f"the tokenizers can't be compared: {error}"
        if draft.vocabulary_mismatch(model) is None:
            return "the draft shares the target's vocabulary: use draft_model"
        if draft.capability.level == "plain":
            return f"the draft model can't roll back: {draft.capability.reason}"
        for each, vocabulary in ((model, pairing.target), (draft, pairing.draft)):
            if not vocabulary.exact:
                return f"the tokens of {each.name} don't spell text byte for byte"
        return None

    def start(self, target: Target) -> Drafter:
        """The draft model reads the prompt at the first step."""
        if self.params.mode == "text":
            return _TextDrafter(self.params, target)
        return _SharedDrafter(self.params, target)


class _OtherDrafter(Drafter):
    """What both modes have in common: the draft's reading and its cache."""

    lookbehind = 0

    def __init__(self, params: UniversalDraftParams, target: Target) -> None:
        assert target.draft is not None
        self._params = params
        self._model = target.draft
        self._vocab_size = target.model.vocab_size
        self._sampling = target.sampling
        self._pairing = pairing = pair(target.model, target.draft)
        direct = pairing.special_to_draft if self.lookbehind else pairing.to_draft
        self._reading = DraftTokens(pairing, direct, self.lookbehind)
        self._sequence = _Sequence(target.draft)
        self._first = self._read = 0  # of its tokens those that it has read
        self._full = False  # the text is longer than the draft's positions

    def propose(self, context: Context) -> TokenTree:
        count = min(self._params.draft_length, context.room - 1, context.max_nodes)
        if count < 1 or self._full:
            return TokenTree.root_only(context.ids[-1])
        same = self._reading.extend(context.ids)
        ids = self._reading.ids
        if self._model.max_length is not None:
            # A drafted token needs its predecessor's position, not its own.
            count = min(count, self._model.max_length - len(ids) + 1)
            self._full = count < 1
        if count < 1 or not ids:
            return TokenTree.root_only(context.ids[-1])
        # As many of its own tokens as of the target's.
        first = reading_from(self._first, self._read, len(ids), context.readable)
        same = max(0, same - first) if first == self._first else 0
        self._first, self._read = first, len(ids)
        logits = self._sequence.read(ids[first:], same)
        return self._draft(context, logits, count)

    @abstractmethod
    def _draft(self, context: Context, logits: torch.Tensor, count: int) -> TokenTree:
        """At most ``count`` draft tokens; ``logits`` ``[draft's vocab]`` come first."""


class _TextDrafter(_OtherDrafter):
    """The draft's likeliest text, in the target's tokens."""

    lookbehind = LOOKBEHIND

    def _draft(self, context: Context, logits: torch.Tensor, count: int) -> TokenTree:
        drafted: list[int] = []
        while True:
            token = int(logits.argmax())
            drafted.append(token)
            if len(drafted) == count or self._pairing.draft.piece(token) is None:
                break
            if _doubtful(logits, token, self._params.stop):
                break
            logits = self._sequence.feed([token])
        most = min(context.room - 1, context.max_nodes)
        tokens = self._translated(context.ids, drafted)[:most]
        return TokenTree.chain(context.ids[-1], tokens)

    def _translated(self, ids: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """The target's tokens for the drafted text behind ``ids``."""
        target = self._pairing.target
        before = self._window(ids)
        # The draft hasn't read an unfinished character: it must begin with it.
        whole = complete(before)
        pending = before[len(whole) :]
        end = self._pairing.special_to_target.get(drafted[-1])
        pieces = [self._pairing.draft.piece(token) for token in drafted]
        text = b"".join(piece for piece in pieces if piece is not None)
        if not text.startswith(pending):
            return []
        finished = complete(whole + text)
        if len(finished) < len(whole + text):
            end = None
        new = finished[len(before) :]
        # With the text before it, so that it's cut where the target would cut it; alone
        # where the last committed token would have swallowed a part of it.
        tokens = target.after(target.spell(finished), new)
        if tokens is None:
            tokens = [] if pending else target.spell(new)
        return tokens if end is None else [*tokens, end]

    def _window(self, ids: Sequence[int]) -> bytes:
        """What the last committed tokens spell, from the start of a character on."""
        pieces: list[bytes] = []
        for token in reversed(ids[-LOOKBEHIND:]):
            piece = self._pairing.target.piece(token)
            if piece is None:
                break
            pieces.append(piece)
        while pieces and 0x80 <= pieces[-1][0] < 0xC0:
            pieces.pop()
        return b"".join(reversed(pieces))


class _SharedDrafter(_OtherDrafter):
    """The draft's distribution over the tokens that the target has too."""

    def __init__(self, params: UniversalDraftParams, target: Target) -> None:
        super().__init__(params, target)
        self._shared = torch.tensor(
            list(self._pairing.to_draft.items()),
            dtype=torch.long,
            device=self._model.device,
        ).reshape(-1, 2)

    def _draft(self, context: Context, logits: torch.Tensor, count: int) -> TokenTree:
        drafted: list[int] = []
        draft_probs: list[torch.Tensor] = []
        while True:
            ids = Continuation(context.ids, drafted)
            probs = self._sampling.probs(ids, self._restricted(logits))
            if self._sampling.greedy:
                token = int(probs.argmax())
            else:
                token = next(iter(self._sampling.draw(probs)), -1)
            own = self._pairing.to_draft.get(token)
            if own is None:  # no shared token is left under the controls
                break
            drafted.append(token)
            draft_probs.append(probs)
            # After the doubtful token, never before it: whether a token is drafted
            # must not depend on which token it is.
            if len(draft_probs) == count or own in self._pairing.special_to_target:
                break
            if _doubtful(logits, own, self._params.stop):
                break
            logits = self._sequence.feed([own])
        if self._sampling.greedy:
            return TokenTree.chain(context.ids[-1], drafted)
        return TokenTree.chain(context.ids[-1], drafted, Drawn.INDEPENDENT, draft_probs)

    def _restricted(self, logits: torch.Tensor) -> torch.Tensor:
        """The draft's logits at the target's tokens ``[vocab]``; -inf at its own."""
        restricted = logits.new_full((self._vocab_size,), -torch.inf)
        restricted[self._shared[:, 0]] = logits[self._shared[:, 1]]
        return restricted


class _Sequence:
    """The draft model's cache: behind what it has read, what it drafted last."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._cache: TreeCache | None = None
        self._tokens: list[int] = []

    def read(self, ids: Sequence[int], same: int) -> torch.Tensor:
        """Logits ``[vocab]`` after ``ids``, whose first ``same`` are cached.

        Nothing that is the same as before is evaluated again, but the last token.
        """
        if self._cache is None:
            self._cache = self._model.new_cache(len(ids))
        most = min(len(self._tokens), len(ids) - 1)
        same = min(same, most)
        while same < most and self._tokens[same] == ids[same]:
            same += 1
        del self._tokens[same:]
        self._cache.truncate(same)
        return self.feed(ids[same:])

    def feed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits ``[vocab]`` after more tokens."""
        assert self._cache is not None
        self._tokens += tokens
        return self._model.prefill(tokens, self._cache).logits[-1]


def _doubtful(logits: torch.Tensor, token: int, stop: float) -> bool:
    return stop > 0 and float(logits.float().softmax(-1)[token]) < stop
