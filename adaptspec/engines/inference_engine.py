"""What every inference engine promises: it answers prompts under a setting, timed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from adaptspec.params import Params, Scalar
from adaptspec.profile import OURS, PLAIN
from adaptspec.strategy import NoParams

if TYPE_CHECKING:
    from adaptspec.profile import Environment
    from adaptspec.workloads import Prompt


@dataclass(frozen=True)
class EngineOptions:
    """What a user tells of an engine and of the models that it runs.

    Args:
        engine: A registered engine's name, or the URL of an OpenAI-compatible server.
        model: A model file, folder or name, as the engine takes it.
        draft_model: The same of a draft model.
        heads: Folders or names of trained heads.
        command: The engine's program; None: the engine's own name on the path.
        python: Python of the environment that the engine is installed in.
        arguments: More arguments of the engine's program, passed on as they are.
        dtype: ``auto``: as the weights are stored.
        device: None: the engine's own choice.
        threads: None: as many as the process may use.
        batch_threads: Of forwards of several tokens; None: as many as ``threads``.
        context: Tokens of the longest prompt with its answer; None: the engine's own.
        concurrency: Requests that are answered at the same time.
        api_key: For a server that wants one.
        trust_remote_code: Run code that comes with a model.
        runs_here: False: an export asks how it is started, which may be on another
            machine, so its processors and devices needn't be here.
    """

    engine: str = OURS
    model: str | None = None
    draft_model: str | None = None
    heads: Sequence[str] = ()
    command: str | None = None
    python: str | None = None
    arguments: Sequence[str] = ()
    dtype: str = "auto"
    device: str | None = None
    threads: int | None = None
    batch_threads: int | None = None
    context: int | None = None
    concurrency: int = 1
    api_key: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    runs_here: bool = True


@dataclass(frozen=True)
class Method:
    """A way of decoding that an engine has, with the parameters that are tuned.

    What a tune reads of a :class:`~adaptspec.strategy.Strategy` class, it reads here.

    Args:
        name: Lower_snake_case; ``autoregressive`` is plain decoding.
        summary: One line: what it does.
        general: Whether it serves prompts of any kind, so that it is confirmed in
            every class.
        opening: Parameters that most texts are drafted well with, where the engine's
            defaults are for other ones; a tune begins with them.
    """

    name: str
    summary: str
    Params: type[Params] = NoParams
    general: bool = True
    lossless: bool = True
    replays: bool = False
    opening: Mapping[str, Scalar] = field(default_factory=dict)


PLAIN_METHOD = Method(PLAIN, "plain decoding: one token in each forward")


@dataclass(frozen=True)
class Answer:
    """One prompt's answer, and what it took as the one who asked sees it.

    Args:
        text: What was generated.
        token_ids: Its tokens; None where the engine tells its text alone.
        tokens: How many they are.
        seconds: From the request to the last token.
        seconds_to_first: From the request to the first token.
        forwards: Of the target, the prompt's left out; 0: the engine doesn't tell.
        proposed: Draft tokens verified, where the engine tells.
        accepted: Draft tokens accepted, where the engine tells.
    """

    text: str
    token_ids: Sequence[int] | None
    tokens: int
    seconds: float
    seconds_to_first: float
    forwards: int = 0
    proposed: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Launch:
    """How a user starts an engine with a setting.

    Args:
        command: The program and its arguments.
        environment: Variables that must be set.
        config: The same as the engine's own JSON configuration, where it has one.
        notes: What the engine can't do, or does otherwise, in sentences.
        path: Folders of programs that it calls, which come first on ``PATH``.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    path: Sequence[str] = ()


class InferenceEngine(ABC):
    """An engine with its models at hand; closed after use, also by ``with``.

    It may keep several settings ready at a time (processes of its own, for instance),
    ``room`` of them at most, and ends the one that was used longest ago.

    Class attributes:
        name: Unique: what ``--engine`` takes.
        summary: One line: what it is.
        starting: Seconds that a new setting takes to be ready, about. Where that is
            much, a tune tries a setting on many prompts at once.
        resting: Seconds after an answer in which it may still keep the cores busy, so
            that another engine isn't measured yet.

    Raises:
        EngineError: from any method, in one line with the way out: a program that isn't
            there, a port in use, no memory, an option that this version doesn't know.
            What the engine printed last is part of it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    starting: ClassVar[float] = 0.0
    resting: float = 0.0

    @classmethod
    @abstractmethod
    def open(cls, options: EngineOptions) -> InferenceEngine:
        """The engine with the models of ``options``, checked as far as it can be."""

    @property
    @abstractmethod
    def environment(self) -> Environment:
        """What a measurement holds for; ``engine`` and ``versions`` name it."""

    @property
    @abstractmethod
    def methods(self) -> Sequence[Method]:
        """What can be tried with what is at hand, plain decoding first."""

    @property
    def unavailable(self) -> Mapping[str, str]:
        """Method -> why it can't be tried here."""
        return {}

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the figures should be told, in sentences, after answers."""
        return ()

    @property
    def room(self) -> int:
        """How many settings can be ready at the same time; 1 at least."""
        return 1

    @property
    def thread_counts(self) -> Sequence[int]:
        """Numbers of threads that a tune should try with plain decoding, the engine's
        own first; empty where the user told one, or where they don't matter."""
        return ()

    def use_threads(self, threads: int, batch_threads: int) -> None:
        """Decode with other threads from now on; a tune asks it of engines with
        ``thread_counts`` alone, an export of those that were measured with others.

        Args:
            threads: Of forwards of one token.
            batch_threads: Of forwards of several tokens.
        """
        raise NotImplementedError(f"{self.name} has one number of threads")

    @abstractmethod
    def answer(
        self,
        method: str,
        params: Mapping[str, Scalar],
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> list[Answer]:
        """Answer ``prompts`` greedily, all at the same time.

        No prompt's answer may be copied from an earlier request: caches of prompts are
        off or emptied.

        Args:
            params: Of the method; those that aren't named have their defaults.
            max_new_tokens: For prompts that don't say.

        Returns:
            One for each prompt, in their order.
        """

    def near_tie(
        self, prompt: Prompt, tokens: Sequence[int], one: int, other: int
    ) -> bool | None:
        """Whether plain decoding of ``tokens`` goes on with either, within rounding.

        Args:
            tokens: Of the answer so far.

        Returns:
            None where the engine can't tell.
        """
        return None

    def launch(self, method: str, params: Mapping[str, Scalar]) -> Launch:
        """How a user starts the engine with a setting.

        Raises:
            EngineError: where it isn't started, but is used in this process.
        """
        from adaptspec.errors import EngineError

        raise EngineError(
            f"{self.name} isn't started with flags: it decodes in the program that "
            "loads it; see `adaptspec generate` and `adaptspec export DIR`"
        )

    @abstractmethod
    def close(self) -> None:
        """End what was started; nothing is left behind."""

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
