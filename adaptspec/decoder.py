"""The face of the library: load a model once, generate with the best strategy."""

from __future__ import annotations

import asyncio
import functools
import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptspec.choosing.learning import Chooser, Finalists, Learning
from adaptspec.choosing.unsure import with_unsure
from adaptspec.classes.classifier import Classifier, Told, stored_record
from adaptspec.classes.last_message import LastMessage
from adaptspec.classes.text_features import prompt_text
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Generation, Run
from adaptspec.decoding.stopping import Stopping
from adaptspec.default_model import default_model_path
from adaptspec.drop_in.arguments import refuse_dropped
from adaptspec.drop_in.generate import decode_prepared
from adaptspec.environment import environment_of
from adaptspec.errors import (
    AdaptSpecError,
    HeadsLoadError,
    InvalidParamsError,
    ModelLoadError,
    ProfileStoreError,
    StoreWarning,
    stopped_by_user,
)
from adaptspec.host import Host
from adaptspec.in_use import Opens, Uses
from adaptspec.knowledge import KnowledgeKeeper
from adaptspec.model.fixed_shapes import Shapes
from adaptspec.model.hardware_costs import stored_costs, use_costs
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import check_kept, load_model
from adaptspec.model.prompts import Prompt
from adaptspec.profile import (
    EVERY_CLASS,
    PLAIN,
    ClassChoice,
    Pick,
    Profile,
    ProfileStore,
)
from adaptspec.selector import Choice, Expected, rank
from adaptspec.shadow import Shadow, token_only
from adaptspec.shadow import shadow as shadow_of
from adaptspec.streaming.stop_text import StopText
from adaptspec.streaming.stream import Result, Stream
from adaptspec.turns import take_all

if TYPE_CHECKING:
    from adaptspec.strategy import Strategy

NO_STORE = (
    "plain decoding: there is no store of profiles; none was given, and no working "
    "plugin opens one (adaptspec strategies names plugins that failed)"
)


BAD_STORE = "plain decoding: the store of profiles can't be used"


class Decoder:
    """Generates with the strategy that was measured to be fastest for a prompt's class.

    Args:
        model: The target.
        draft: A draft model for the strategies that need one.
        store: Where profiles are; they are read once, here. Without one, or where it
            can't be read (a warning says why), plain decoding is chosen.
        host: The plugins; None: those installed.
        learn: Whether strategies keep what they learn across requests in files beside
            the profiles, and read it there. It may hold token ids of earlier outputs.
        allow_lossy: Whether a strategy may be chosen that changes the distribution of
            sampled output. Asked for by name, it is used anyway; the result says so.
        record: Whether tokens and times of requests are added up by setting and class,
            and written to the store at times and at exit. It holds sums alone. Without
            it nothing is learnt from requests.
        opens: Opens the store to write to; None: ``store`` stays open.
        run: Only what this tuning run decided counts; default: the best evidence.
        guard: Whether drafting is passed over while it loses time; False is for
            measurements, and nothing is learnt from such requests.
        adapt: Whether the choice among a class's tuned settings follows what requests
            took, and how; False: it is what was tuned.
    """

    def __init__(
        self,
        model: LanguageModel,
        draft: LanguageModel | None = None,
        store: ProfileStore | None = None,
        host: Host | None = None,
        learn: bool = False,
        allow_lossy: bool = False,
        record: bool = True,
        opens: Opens | None = None,
        run: str | None = None,
        guard: bool = True,
        *,
        adapt: bool | Learning = True,
    ) -> None:
        self.model, self.draft = model, draft
        self.host = host or Host.installed()
        self._allow_lossy, self._run_id = allow_lossy, run
        self.engine = Engine(model, draft, guard=guard)
        self.environment = environment_of(model, draft)
        self.profiles: list[Profile] = []
        self.choices: list[ClassChoice] = []
        self._classifier: Classifier | None = None
        self._uses: Uses | None = None
        if not isinstance(adapt, bool | Learning):
            raise AdaptSpecError(
                f"adapt must be True, False or a Learning, got {adapt!r}; pass False "
                "to keep to what was tuned"
            )
        self._adapt = bool(adapt)
        self._learning = adapt if isinstance(adapt, Learning) else Learning()
        self._chooser: Chooser | None = None
        self._unprofiled: str | None = NO_STORE  # why no profile can be chosen from
        self._told: set[str] = set()
        if store is not None:
            try:
                self._read_store(store)
                if record:
                    self._open_uses(store, opens or _kept_open(store))
            except ProfileStoreError as error:
                self.give_up_store(error)
        self._keeper: KnowledgeKeeper | None = None
        self._folder = store.folder if store is not None and learn else None
        self._open_keeper()
        self._strategies: dict[tuple[str, str], Strategy] = {}
        self.last: list[Result] = []  # of each row of the latest ended __call__
        self._finalists: dict[str | None, Finalists] = {}

    def give_up_store(self, error: ProfileStoreError) -> None:
        """Decode plainly from here on, since profiles can't be read; say so once."""
        self.profiles, self.choices, self._classifier = [], [], None
        self._unprofiled = BAD_STORE
        self._told.add(BAD_STORE)
        warnings.warn(f"{BAD_STORE}: {error}", NoStoreWarning, stacklevel=4)

    def _open_uses(self, store: ProfileStore, opens: Opens) -> None:
        """Read what was recorded; where it can't be, choices count without it."""
        try:
            self._uses = Uses(opens, store.uses())
        except ProfileStoreError as error:
            said = f"what requests take isn't recorded or learnt from: {error}"
            warnings.warn(said, StoreWarning, stacklevel=4)
            return
        self._chooser = Chooser(self._uses, self._learning)
        weakref.finalize(self, self._uses.close)  # at exit, too

    def _read_store(self, store: ProfileStore) -> None:
        # What was measured of other engines says nothing of this one.
        ours = self.environment.engine
        self.profiles = [
            profile
            for profile in store.profiles(model=self.model.digest)
            if profile.environment.engine == ours
        ]
        self.choices = [
            choice
            for choice in store.choices(model=self.model.digest)
            if choice.environment.engine == ours
        ]
        if not self.choices:
            # Another version of the same model: select says so.
            self.choices = [
                choice
                for choice in store.choices()
                if choice.environment.model_name == self.environment.model_name
                and choice.environment.engine == ours
            ]
        self._classifier = self._stored_classifier(store)
        if self.choices:
            costs = stored_costs(store, self.environment)
            if costs is not None:
                use_costs(costs, self.model, self.draft)
        self._unprofiled = None

    def choose(
        self,
        prompt_class: str | None = None,
        strategy: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Choice:
        """What ``generate`` would decode with, and why.

        That is what is expected to be fastest: now and then a request is decoded with
        another setting, to see whether that is faster by now.
        """
        return self._chosen(prompt_class, strategy, params, tries=False)[0]

    def _chosen(
        self,
        prompt_class: str | None,
        strategy: str | None,
        params: Mapping[str, Any] | None,
        tries: bool = True,
    ) -> tuple[Choice, Finalists | None, int]:
        """The choice, and its place among the finalists that it was made from.

        Args:
            tries: Whether it may be one that isn't expected to be fastest.
        """
        for name, value in (("prompt_class", prompt_class), ("strategy", strategy)):
            if not isinstance(value, str | None):
                raise AdaptSpecError(
                    f"{name} must be a name, a text, got {value!r}; leave it out to "
                    "have it chosen"
                )
        if not isinstance(params, Mapping | None):
            raise InvalidParamsError(
                f"params must be a mapping of names to values, got {params!r}; pass "
                "{'draft_length': 4}, say, or leave it out"
            )
        if strategy is not None:
            lossless = strategy not in self._lossy()
            asked = dict(params or {})
            return Choice(prompt_class, strategy, asked, "asked for", lossless), None, 0
        if params:
            raise AdaptSpecError("params need a strategy: pass strategy= too")
        if self._unprofiled is not None:
            return Choice(prompt_class, PLAIN, {}, self._unprofiled), None, 0
        finalists = self._finalists.get(prompt_class)
        if finalists is None:  # other threads may clear them at any time
            finalists = self.model.turns.take(lambda: self._ranked(prompt_class))
            self._finalists[prompt_class] = finalists
        if self._chooser is None or not self._adapt:
            return finalists.ranking.choices[0], finalists, 0
        chooser = self._chooser
        place = chooser.choose(finalists) if tries else chooser.best(finalists)
        return chooser.explained(finalists, place), finalists, place

    def _ranked(self, prompt_class: str | None) -> Finalists:
        """The settings that were decided on for a class, with their profiles."""
        lossy = self._lossy() if self._allow_lossy else ()
        ranking = rank(
            self.choices,
            self.environment,
            prompt_class,
            lossy,
            run=self._run_id,
            refused=self._refused,
        )
        tries = self._chooser is not None and self._adapt and self.engine.guard
        # Without a guard nothing bounds what a try loses, nor is anything learnt.
        if tries and self._learning.exploration:
            ranking = with_unsure(
                ranking, self.profiles, self.environment, lossy, self._refused
            )
        profiles = [self._profile_of(choice) for choice in ranking.choices]
        ids = [None if profile is None else profile.id for profile in profiles]
        choices = [
            self._expecting(choice, profile)
            for choice, profile in zip(ranking.choices, profiles, strict=True)
        ]
        return Finalists(replace(ranking, choices=choices), ids)

    def _expecting(self, choice: Choice, profile: Profile | None) -> Choice:
        """With the speed that its profile makes expected, if it is of this place."""
        if profile is None or profile.environment.place() != self.environment.place():
            return choice
        return replace(choice, expected=Expected.of(profile.measurement))

    def _profile_of(self, choice: Choice) -> Profile | None:
        """The profile of a setting that a run decided on for a class."""
        name = choice.prompt_class or EVERY_CLASS
        wanted = (choice.run, name, choice.strategy, dict(choice.params), False)
        for p in self.profiles:
            own = (p.run, p.prompt_class, p.strategy, dict(p.params), p.baseline)
            if own == wanted and p.id is not None:
                return p
        return None

    def _refused(self, pick: Pick) -> str | None:
        """Why a setting can't be used; None if it can."""
        try:
            cls = self.host.strategy(pick.strategy)
            cls.Params.parse(pick.params, pick.strategy)
            return cls.unavailable(self.model, self.draft)
        except AdaptSpecError as error:
            return str(error)

    def generate(
        self,
        prompt: Prompt,
        *,
        prompt_class: str | None = None,
        strategy: str | None = None,
        params: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        include_stop: bool = False,
        raw: bool = False,
        tools: Sequence[Any] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        shadow: bool = False,
        **controls: Any,
    ) -> Result:
        """Decode after a prompt.

        Args:
            prompt: A text, which is a user's message where the model has a chat
                template; a chat, as a list of messages (mappings with ``role`` and
                ``content``); or token ids: a list, an array, a tensor, or what a
                tokenizer returns.
            prompt_class: The class its kind was profiled under.
            strategy: Overrides the choice.
            params: The strategy's parameters; those left out have their defaults.
            max_new_tokens: Default: the model's configuration, else 128.
            temperature: 0 is greedy; default: as the model's configuration says.
            include_stop: Leave the stop string that ended the output in its text. The
                token ids hold it either way.
            raw: Read a text as it is, without the chat template.
            tools: What the model may call: JSON schemas, or functions with type hints.
            template_arguments: Further arguments of the model's chat template, such as
                ``enable_thinking`` or ``documents``.
            shadow: Decode plainly, and say in ``result.shadows`` what each strategy
                that drafts from tokens alone would have saved. They are run when the
                result of an ended stream is asked for, so the text doesn't wait.
            **controls: Any other argument of
                :meth:`~adaptspec.decoding.controls.Controls.for_model`.

        Returns:
            Text and token ids of the output, what decoded it and why, and how it went.

        Raises:
            AdaptSpecError: for a bad prompt, control, strategy or parameter;
                ``NoValidTokenError`` where no token can be chosen.
        """
        stream = self._run(
            prompt,
            prompt_class,
            strategy,
            params,
            max_new_tokens,
            temperature,
            include_stop,
            {"raw": raw, "tools": tools, "template_arguments": template_arguments},
            controls,
            shadow,
        )
        stream.finish()
        return stream.result

    def stream(
        self,
        prompt: Prompt,
        *,
        prompt_class: str | None = None,
        strategy: str | None = None,
        params: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        include_stop: bool = False,
        raw: bool = False,
        tools: Sequence[Any] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        shadow: bool = False,
        **controls: Any,
    ) -> Stream:
        """The same, as pieces of text as soon as they are accepted.

        A piece comes per token, or per few where a character spans several tokens or
        a stop string may have begun. The prompt is read with the first one asked for.
        ``async for`` reads it without keeping the event loop waiting.

        Raises:
            AdaptSpecError: for a bad prompt, control, strategy or parameter. Reading
                raises ``NoValidTokenError`` where no token can be chosen.
        """
        return self._run(
            prompt,
            prompt_class,
            strategy,
            params,
            max_new_tokens,
            temperature,
            include_stop,
            {"raw": raw, "tools": tools, "template_arguments": template_arguments},
            controls,
            shadow,
        )

    async def astream(self, prompt: Prompt, **asked: Any) -> Stream:
        """:meth:`stream`, whose start doesn't keep the event loop waiting, either.

        The first request of a model takes seconds to find out what it can verify.
        """
        loop = asyncio.get_running_loop()
        begin = functools.partial(self.stream, prompt, **asked)
        return await loop.run_in_executor(self.model.turns.worker, begin)

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: Any,
        prompt_class: str | None = None,
        strategy: str | None = None,
        params: Mapping[str, Any] | None = None,
        adaptspec_streamer: Any = None,
        **arguments: Any,
    ) -> Any:
        """Decode inside ``model.generate(..., custom_generate=decoder)``.

        Transformers calls it with what it has prepared. Of what it doesn't hand on, an
        assistant model and a streamer are refused; stop strings and streamers need
        :func:`adaptspec.speed_up`. :attr:`last` has the result of each row afterwards.

        Args:
            model: The object whose ``generate`` was called: this decoder's model.
            input_ids: ``[rows, length]``, padded on the left.
            prompt_class: As in :meth:`generate`, and so the next two.
            adaptspec_streamer: Gets accepted tokens as transformers' streamers do,
                without the prompt.
            **arguments: Of the model's forward.

        Returns:
            As ``generate`` does.

        Raises:
            UnsupportedControlError: naming what can't be honoured.
        """
        self._follow()

        def opens(ids: list[int], controls: Controls) -> Stream:
            return self._start(ids, controls, prompt_class, strategy, params)

        refuse_dropped(sys._getframe(1))
        output, self.last = decode_prepared(
            self.model,
            opens,
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            adaptspec_streamer,
            arguments,
        )
        return output

    def classify(self, prompt: Prompt, **encoding: Any) -> Told | None:
        """What the prompt's text tells of its class.

        None where no classes were learnt (a workload declares two or more), or where
        the prompt is token ids and the model has no tokenizer.

        Args:
            **encoding: ``raw``, ``tools`` and ``template_arguments``, as given to
                :meth:`generate`.
        """
        self._follow()
        text = prompt_text(prompt)

        def tell() -> Told | None:
            ids = self.model.encode(prompt, **encoding) if text is None else []
            return self._tell(text, ids)

        return self.model.turns.take(tell)

    def _timed_tell(
        self, text: str | None, ids: Sequence[int]
    ) -> tuple[Told | None, float]:
        """:meth:`_tell`, and the seconds that it took."""
        started = perf_counter()
        return self._tell(text, ids), perf_counter() - started

    def _tell(self, text: str | None, ids: Sequence[int]) -> Told | None:
        """What the text tells, or without one the last message of the ids."""
        if self._classifier is None:
            return None
        if text is None:
            if self.model.tokenizer is None:
                return None
            text = self._last_message(ids)
        return self._classifier.tell(text)

    @functools.cached_property
    def _last_message(self) -> LastMessage:
        return LastMessage(self.model.tokenizer)

    def _follow(self) -> None:
        """Take over changes of the caller's models; profiles are of one version."""
        changed: list[bool] = []

        def follow() -> None:
            for model in self.engine.models:
                changed.append(model.follow())

        try:
            take_all(self.engine.turns, follow)
        finally:
            if any(changed):  # also where the second one can't be followed
                self._begin_anew()

    def _begin_anew(self) -> None:
        """A model has changed: profiles and what strategies learnt are of another."""
        self.environment = environment_of(self.model, self.draft)
        self._finalists.clear()
        if self._keeper is not None:
            self._keeper.save()  # not the uses: a request is waiting
        self._strategies.clear()
        self._open_keeper()

    def _open_keeper(self) -> None:
        if self._folder is not None:
            folder = self._folder / "knowledge"
            self._keeper = KnowledgeKeeper(
                folder, self.model.digest, in_turn=self.model.turns.take
            )
            weakref.finalize(self, self._keeper.save)  # at exit, too

    def _stored_classifier(self, store: ProfileStore) -> Classifier | None:
        """What was learnt for the model, whatever it was tuned with."""
        choices = [c for c in self.choices if self._run_id in (None, c.run)]
        record = stored_record(store, choices)
        try:
            return None if record is None else Classifier.from_json(record)
        except AdaptSpecError as error:
            warnings.warn(f"classes can't be told: {error}", stacklevel=4)
            return None

    def save(self) -> None:
        """Write down now what was learnt and recorded; done at exit anyway."""
        if self._keeper is not None:
            self._keeper.save()
        if self._uses is not None:
            self._uses.close()

    def _run(
        self,
        prompt: Prompt,
        prompt_class: str | None,
        strategy: str | None,
        params: Mapping[str, Any] | None,
        max_new_tokens: int | None,
        temperature: float | None,
        include_stop: bool,
        encoding: Mapping[str, Any],
        controls: Mapping[str, Any],
        shadow: bool,
    ) -> Stream:
        if shadow and strategy is not None:
            raise AdaptSpecError(
                f"shadow=True decodes plainly, got strategy={strategy!r}; leave out one"
            )
        self._follow()
        settings = Controls.for_model(
            self.model,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            **controls,
        )
        if shadow and settings.language is not None:
            raise AdaptSpecError(
                f"shadow=True tells nothing under {settings.language[0]}, which drafts "
                "by itself; leave out one"
            )
        # Tokenizers of transformers mustn't be used by two threads at once.
        ids = self.model.turns.take(lambda: self.model.encode(prompt, **encoding))
        text = prompt_text(prompt)
        return self._start(
            ids, settings, prompt_class, strategy, params, text, include_stop, shadow
        )

    def _start(
        self,
        ids: list[int],
        settings: Controls,
        prompt_class: str | None,
        strategy: str | None,
        params: Mapping[str, Any] | None,
        text: str | None = None,
        include_stop: bool = False,
        shadow: bool = False,
    ) -> Stream:
        """Begin to decode; ``text`` is the prompt's where it isn't ids alone."""
        told, seconds = None, 0.0
        if prompt_class is None and strategy is None and self._classifier is not None:
            told, seconds = self.model.turns.take(lambda: self._timed_tell(text, ids))
        if told is not None:
            prompt_class = told.prompt_class
        choice, finalists, place = self._chosen(prompt_class, strategy, params)
        unsure = finalists is not None and finalists.ranking.unsure
        if strategy is None and choice.strategy == PLAIN and (unsure or place == 0):
            known = choice if finalists is None else finalists.ranking.choices[place]
            self._tell_once(known.reason)
        if told is not None:
            choice = replace(choice, reason=f"{told.reason}; {choice.reason}")
        chosen = choice
        if shadow:
            said = f"plain decoding, with shadow; otherwise {choice.strategy}"
            choice, finalists = Choice(choice.prompt_class, PLAIN, {}, said), None
        drafting = self._strategy(choice)
        if choice.expected is not None and not unsure:
            self.engine.guard_memory(drafting).promise(choice.expected.ratio)

        def ended(generation: Generation) -> None:
            if self._keeper is not None:
                self._keeper.refresh()
            if self._chooser is not None and finalists is not None:
                self._chooser.add(finalists, place, generation.stats)

        def begin() -> Stream:
            run = Run(self.engine, drafting, ids, settings)
            stop_text, strings = None, settings.stop_strings
            if settings.prepared is not None:
                strings += settings.prepared.stop_strings
            if strings and not include_stop:
                looks = replace(settings, stop_strings=strings, prepared=None)
                stop_text = StopText(self.model, Stopping(self.model, looks), ids)
            shadows = functools.partial(self._shadows, chosen, run) if shadow else None
            return Stream(self.engine, run, choice, seconds, ended, stop_text, shadows)

        # The tokenizer is used here, too.
        return take_all(self.engine.turns, begin)

    def _shadows(
        self, chosen: Choice, run: Run, generation: Generation
    ) -> list[Shadow]:
        """What each strategy that drafts from tokens alone would have done.

        The chosen one with its parameters, the others with their defaults. One that
        fails is left out with a warning.
        """
        found = []
        for name in self.host.strategies.keys() - {PLAIN}:
            params = chosen.params if name == chosen.strategy else {}
            try:
                strategy = self._strategy(Choice(None, name, params))
                if token_only(strategy, run) is None:
                    cast = functools.partial(shadow_of, strategy, run, generation)
                    found.append(self.model.turns.take(cast))
            except Exception as error:  # a third party's strategy may raise anything
                if stopped_by_user(error):
                    raise
                said = f"{name} is left out of the shadows: {error}"
                warnings.warn(said, stacklevel=5)
        return sorted(found, key=lambda one: -(one.ratio or 0.0))

    def _strategy(self, choice: Choice) -> Strategy:
        """One instance per setting, so that what it learns lasts across requests."""
        key = (choice.strategy, repr(sorted(choice.params.items())))
        if (known := self._strategies.get(key)) is not None:
            return known
        strategy = self.host.create(choice.strategy, choice.params)
        used = self._strategies.setdefault(key, strategy)  # another thread's, perhaps
        if used is strategy and self._keeper is not None:
            self._keeper.adopt(strategy)
        return used

    def _lossy(self) -> set[str]:
        return {name for name, cls in self.host.strategies.items() if not cls.lossless}

    def _tell_once(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(reason, PlainDecodingWarning, stacklevel=5)


class PlainDecodingWarning(UserWarning):
    """Nothing faster than plain decoding is known here; said once per reason."""


class NoStoreWarning(PlainDecodingWarning, StoreWarning):
    """The store of profiles can't be used; whatever was measured, decoding is plain."""


def load(
    model: str | Path | nn.Module | LanguageModel | None = None,
    draft_model: str | Path | nn.Module | LanguageModel | None = None,
    db: str | Path | ProfileStore | None = None,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    threads: int | None = None,
    host: Host | None = None,
    learn: bool = False,
    heads: str | Path | Sequence[str | Path] = (),
    allow_lossy: bool = False,
    trust_remote_code: bool = False,
    record: bool = True,
    run: str | None = None,
    adapt: bool | Learning = True,
    shapes: Shapes = "auto",
    compile: bool = False,
) -> Decoder:
    """Load a target, perhaps a draft model, and the profiles measured for them.

    Args:
        model: A folder or hub name, or a loaded ``AutoModelForCausalLM``, which is
            used as it is and never changed. None: the embedded model.
        draft_model: The same for the draft.
        tokenizer: Of the target; None: the one in the folder that it is, or was, loaded
            from. Without one, prompts are token ids, and stop strings are refused.
        dtype: Of models that are loaded here; ``auto`` keeps the checkpoint's. A target
            that is loaded already must have it.
        device: The same; None: CUDA if there is one, else the CPU.
        db: Path or SQLAlchemy URL of the profile database; None: the user's own, or no
            profiles if no plugin opens one. Where it can't be used, a warning says why,
            and decoding is plain.
        threads: Threads of torch, set for the whole process; None leaves them. Profiles
            measured with as many come first.
        host: The plugins; None: those installed.
        learn: See :class:`Decoder`.
        heads: Folders of heads trained for the target, for the strategies that draft
            with them.
        allow_lossy: See :class:`Decoder`.
        trust_remote_code: Whether code that comes with the models may run.
        record: See :class:`Decoder`.
        run: See :class:`Decoder`.
        adapt: See :class:`Decoder`.
        shapes: ``auto``: on CUDA, forwards of few fixed shapes as graphs, or what of
            that gives the same logits. ``fixed``: fixed shapes without graphs.
            ``dynamic``: each forward has its own shape.
        compile: Norms and MLPs run as ``torch.compile`` makes them, in place of our
            own operations. The first load waits for it; later ones read a cache.

    Raises:
        ModelLoadError: if a model can't be loaded.
        HeadsLoadError: if heads can't be read or don't fit the target.
        ProfileStoreError: if ``db`` is given and no plugin opens databases.
        AdaptSpecError: for another argument that can't be.
    """
    if threads is not None:
        whole = isinstance(threads, int) and not isinstance(threads, bool)
        if not whole or threads < 1:
            raise AdaptSpecError(
                f"threads must be a whole number above 0, got {threads!r}; leave it "
                "out to keep torch's"
            )
        torch.set_num_threads(threads)
    if not (db is None or isinstance(db, str | Path) or hasattr(db, "profiles")):
        raise ProfileStoreError(
            f"db must be a path, an SQLAlchemy URL or an open store, got {db!r}; leave "
            "it out for your own database"
        )
    folders = [heads] if isinstance(heads, str | Path) else heads
    if not isinstance(folders, list | tuple) or not all(
        isinstance(folder, str | Path) for folder in folders
    ):
        raise HeadsLoadError(f"heads must be folders, got {heads!r}; pass their paths")
    if model is None:
        model = default_model_path(lambda line: print(line, file=sys.stderr))
    host = host or Host.installed()
    target = _language_model(
        model, tokenizer, dtype, device, trust_remote_code, shapes, compile
    )
    for folder in folders:
        target.attach(host.open_heads(folder, target))
    # One that is loaded already stays as it is.
    loads = isinstance(draft_model, str | Path)
    draft = (
        None
        if draft_model is None
        else _language_model(
            *(draft_model, None, dtype if loads else "auto"),
            *(target.device if loads else None, trust_remote_code),
            *(shapes, compile),
        )
    )
    can_open = host.opens_stores
    if db is None and not can_open:
        return Decoder(target, draft, None, host, learn, allow_lossy, run=run)
    if db is None or isinstance(db, str | Path):
        url = None if db is None else str(db)

        def opens() -> closing[ProfileStore]:
            return closing(host.open_store(url))

        try:
            opened = opens()
        except ProfileStoreError as error:
            if not can_open:
                raise
            decoder = Decoder(target, draft, None, host, learn, allow_lossy, run=run)
            decoder.give_up_store(error)
            return decoder
        with opened as store:
            url = _absolute(url, store)
            return Decoder(
                *(target, draft, store, host, learn, allow_lossy, record, opens, run),
                adapt=adapt,
            )
    return Decoder(
        *(target, draft, db, host, learn, allow_lossy, record), run=run, adapt=adapt
    )


def _absolute(url: str | None, store: ProfileStore) -> str | None:
    """What opens the same database later, wherever the program has moved since."""
    file = store.url.removeprefix("sqlite:///")
    if file == store.url or not Path(file).is_file():
        return url
    return str(Path(file).absolute())


def _kept_open(store: ProfileStore) -> Opens:
    return lambda: nullcontext(store)


def _language_model(
    model: str | Path | nn.Module | LanguageModel,
    tokenizer: Any,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    trust_remote_code: bool,
    shapes: Shapes,
    compile: bool,
) -> LanguageModel:
    if isinstance(model, LanguageModel):
        if shapes not in ("auto", model.asked_shapes):
            raise ModelLoadError(
                f"shapes must be those that {model.name} was loaded with "
                f"({model.asked_shapes}), got {shapes!r}; pass them to LanguageModel"
            )
        if compile and not model.compile:
            raise ModelLoadError(
                f"compile=True came with {model.name}, which is loaded already; "
                "pass it to LanguageModel"
            )
        if tokenizer not in (None, model.tokenizer):
            raise ModelLoadError(
                f"tokenizer= came with {model.name}, which is loaded already; pass it "
                "to LanguageModel"
            )
        check_kept(model, dtype, device)
        return model
    return load_model(
        model,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        shapes=shapes,
        compile=compile,
    )
