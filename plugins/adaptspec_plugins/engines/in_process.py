"""What engines have in common that decode in this process, one request at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from adaptspec.engines.inference_engine import Answer, EngineOptions, InferenceEngine
from adaptspec.errors import EngineError
from adaptspec.params import Scalar

if TYPE_CHECKING:
    from adaptspec.host import Host
    from adaptspec.model.language_model import LanguageModel
    from adaptspec.profile import Environment
    from adaptspec.workloads import Prompt


class InProcessEngine(InferenceEngine):
    """Loads the models when something is first asked of them.

    Class attributes:
        accelerate: Whether our products and kernels are put into the models.
        takes_heads: Whether trained heads can be attached.
    """

    accelerate: ClassVar[bool]
    takes_heads: ClassVar[bool] = False

    def __init__(self, options: EngineOptions) -> None:
        self._options = options

    @classmethod
    def open(cls, options: EngineOptions) -> InferenceEngine:
        """The engine; nothing is loaded yet.

        Raises:
            EngineError: for an option that it can't honour.
        """
        refused = {
            "--engine-command": options.command,
            "--engine-python": options.python,
            "--engine-argument": list(options.arguments),
            "--context": options.context,
            "--batch-threads": options.batch_threads,
            "--heads": [] if cls.takes_heads else list(options.heads),
            "--api-key": None if options.api_key is None else "a key",  # never printed
        }
        for flag, value in refused.items():
            if value:
                raise EngineError(
                    f"{flag} says nothing to {cls.name}, which decodes in this "
                    f"process, got {value}; leave it out"
                )
        if options.concurrency != 1:
            raise EngineError(
                f"{cls.name} is measured at one request at a time, got --concurrency "
                f"{options.concurrency}; leave it out"
            )
        return cls(options)

    @cached_property
    def _host(self) -> Host:
        from adaptspec.host import Host

        return Host.installed()

    @cached_property
    def _model(self) -> LanguageModel:
        """The target, with its heads."""
        model = self._options.model
        if model is None:
            from adaptspec.default_model import default_model_path

            model = str(default_model_path(lambda text: None))
        target = self._loaded(model)
        for folder in self._options.heads:
            target.attach(self._host.open_heads(Path(folder), target))
        return target

    @cached_property
    def _draft(self) -> LanguageModel | None:
        given = self._options.draft_model
        return None if given is None else self._loaded(given)

    def _loaded(self, source: str) -> LanguageModel:
        from adaptspec.model.loading import load_model

        options = self._options
        return load_model(
            source,
            dtype=options.dtype,
            device=options.device,
            accelerate=self.accelerate,
            trust_remote_code=options.trust_remote_code,
        )

    @property
    def environment(self) -> Environment:
        """The models and this machine; loads the models."""
        from adaptspec.environment import environment_of

        with self._own_threads():
            return replace(environment_of(self._model, self._draft), engine=self.name)

    def answer(
        self,
        method: str,
        params: Mapping[str, Scalar],
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> list[Answer]:
        """Answer one prompt after the other.

        Raises:
            EngineError: for an unknown method, or several prompts.
        """
        if method not in {known.name for known in self.methods}:
            reason = self.unavailable.get(method, "it has no such method")
            raise EngineError(f"{self.name} can't decode with {method!r}: {reason}")
        if len(prompts) > 1:
            raise EngineError(
                f"{self.name} answers one request at a time, got {len(prompts)}"
            )
        with self._own_threads():
            return [
                self._answer(
                    *(method, params, prompt.encode(self._model)),
                    prompt.max_new_tokens or max_new_tokens,
                )
                for prompt in prompts
            ]

    @contextmanager
    def _own_threads(self) -> Iterator[None]:
        """Within it torch has this engine's number of threads; it is one number for the
        process, in which other engines decode, too."""
        import torch

        before, own = torch.get_num_threads(), self._options.threads
        if own is None or own == before:
            yield
            return
        torch.set_num_threads(own)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @abstractmethod
    def _answer(
        self,
        method: str,
        params: Mapping[str, Scalar],
        ids: list[int],
        max_new_tokens: int,
    ) -> Answer:
        """One answer."""

    def near_tie(
        self, prompt: Prompt, tokens: Sequence[int], one: int, other: int
    ) -> bool | None:
        """A fresh forward's logits tell."""
        from adaptspec.decoding.near_ties import near_tie

        model = self._model
        ids = [*prompt.encode(model), *tokens]
        with self._own_threads():
            forward = model.read_alone(ids)
        logits = forward.logits[forward.rows[len(ids) - 1]]
        return near_tie(logits, one, other, model.dtype)

    def close(self) -> None:
        """Let go of the models."""
        self.__dict__.pop("_model", None)
        self.__dict__.pop("_draft", None)
