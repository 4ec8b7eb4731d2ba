"""Hugging Face's ``generate`` as an engine: plain, assisted and prompt lookup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from adaptspec.engines.inference_engine import PLAIN_METHOD, Answer, Method
from adaptspec.params import Scalar
from adaptspec.profile import PLAIN
from adaptspec_plugins.engines.in_process import InProcessEngine

if TYPE_CHECKING:
    from adaptspec.strategy import Baseline


class TransformersEngine(InProcessEngine):
    """The models as transformers loads them, decoded by its own ``generate``."""

    name = "transformers"
    summary = "Hugging Face's generate: plain, assisted and prompt lookup"
    accelerate: ClassVar[bool] = False

    @cached_property
    def _baselines(self) -> Mapping[str, type[Baseline]]:
        """Method -> what decodes with it."""
        from adaptspec_plugins.baselines.huggingface import (
            HFAssisted,
            HFGenerate,
            HFPromptLookup,
        )

        return {
            PLAIN: HFGenerate,
            HFAssisted.name: HFAssisted,
            HFPromptLookup.name: HFPromptLookup,
        }

    @cached_property
    def methods(self) -> Sequence[Method]:
        """What ``generate`` can do with these models."""
        unavailable = self.unavailable
        return [
            PLAIN_METHOD,
            *(
                Method(name, cls.summary, cls.Params)
                for name, cls in self._baselines.items()
                if name != PLAIN and name not in unavailable
            ),
        ]

    @cached_property
    def unavailable(self) -> Mapping[str, str]:
        """What it can't do with these models."""
        return {
            name: reason
            for name, cls in self._baselines.items()
            if (reason := cls.unavailable(self._model, self._draft)) is not None
        }

    def _answer(
        self,
        method: str,
        params: Mapping[str, Scalar],
        ids: list[int],
        max_new_tokens: int,
    ) -> Answer:
        cls = self._baselines[method]
        baseline = cls(cls.Params.parse(dict(params), method))
        run = baseline.run(self._model, self._draft, ids, max_new_tokens)
        first = run.seconds_prefill or 0.0
        return Answer(
            text=self._model.decode(run.token_ids),
            token_ids=run.token_ids,
            tokens=len(run.token_ids),
            seconds=run.seconds,
            seconds_to_first=first,
            forwards=run.target_forwards or 0,
        )
