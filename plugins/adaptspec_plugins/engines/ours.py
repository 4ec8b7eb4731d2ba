"""AdaptSpec itself as one of the engines that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from adaptspec.engines.inference_engine import PLAIN_METHOD, Answer, Method
from adaptspec.params import Scalar
from adaptspec.profile import OURS, PLAIN
from adaptspec_plugins.engines.in_process import InProcessEngine

if TYPE_CHECKING:
    from adaptspec.decoding.engine import Engine


class AdaptSpecEngine(InProcessEngine):
    """Our loop with every lossless strategy that is installed.

    A strategy learns nothing from one answer for the next.
    """

    name = OURS
    summary = "this program's own decoding, with every strategy that is installed"
    accelerate: ClassVar[bool] = True
    takes_heads: ClassVar[bool] = True

    @cached_property
    def methods(self) -> Sequence[Method]:
        """The strategies that run on these models."""
        unavailable = self.unavailable
        return [
            PLAIN_METHOD,
            *(
                Method(name, cls.summary, cls.Params, cls.general)
                for name, cls in sorted(self._host.strategies.items())
                if name != PLAIN and cls.lossless and name not in unavailable
            ),
        ]

    @cached_property
    def unavailable(self) -> Mapping[str, str]:
        """Strategies that don't run on these models."""
        return {
            name: reason
            for name, cls in self._host.strategies.items()
            if cls.lossless
            and (reason := cls.unavailable(self._model, self._draft)) is not None
        }

    @cached_property
    def _engine(self) -> Engine:
        from adaptspec.decoding.engine import Engine

        return Engine(self._model, self._draft)

    def _answer(
        self,
        method: str,
        params: Mapping[str, Scalar],
        ids: list[int],
        max_new_tokens: int,
    ) -> Answer:
        from adaptspec.decoding.controls import Controls
        from adaptspec.decoding.generation_fields import ONE_SEQUENCE

        controls = Controls.for_model(
            self._model,
            **{**ONE_SEQUENCE, "temperature": 0.0, "max_new_tokens": max_new_tokens},
        )
        strategy = self._host.create(method, params)
        run = self._engine.generate(strategy, ids, controls)
        stats = run.stats
        return Answer(
            text=self._model.decode(run.token_ids),
            token_ids=run.token_ids,
            tokens=len(run.token_ids),
            seconds=stats.seconds_prefill + stats.seconds_decode,
            seconds_to_first=stats.seconds_prefill,
            forwards=stats.target_forwards,
            proposed=stats.proposed,
            accepted=stats.accepted,
        )

    def close(self) -> None:
        """Let go of the models."""
        self.__dict__.pop("_engine", None)
        super().close()
