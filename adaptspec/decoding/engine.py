"""The one loop of every strategy: prefill, propose, verify, commit."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch

from adaptspec.decoding.acceptance import (
    Accepted,
    accept_matching,
    accept_sampled,
    accept_typical,
)
from adaptspec.decoding.constraint import Shaped
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.guard import Guard, GuardMemory, PlainTimes
from adaptspec.decoding.processing import Processors
from adaptspec.decoding.sampling import Sampler, choosable, no_valid_token
from adaptspec.decoding.stats import RunStats, StepStats
from adaptspec.decoding.stopping import Stopping
from adaptspec.errors import (
    InvalidPromptError,
    NoValidTokenError,
    SequenceStateError,
    UnavailableStrategyError,
)
from adaptspec.model.forked import heed_fork
from adaptspec.model.forward import Forward
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.rotary import depth_limit
from adaptspec.strategy import Context, Drafter, Observes, Outcome, Strategy, Target
from adaptspec.structured.opening import open_constraint
from adaptspec.token_ids import Continuation
from adaptspec.token_tree import Drawn, TokenTree
from adaptspec.turns import Turns, take_all

Answer = TypeVar("Answer")
# `stop`: a stop string, or a finished grammar where no token ends the output.
# `unfinished`: more would have come, but the iteration was given up, or goes on.
Finish = Literal["length", "eos", "stop", "time", "unfinished"]


@dataclass(frozen=True)
class Generation:
    """Generated tokens, run statistics, and the reason why generation stopped.

    ``seed`` is the seed of the sampling noise. It is None if nothing was sampled and no
    seed was given.
    """

    token_ids: list[int]
    stats: RunStats
    finish: Finish
    seed: int | None = None


class Engine:
    """Decodes one sequence at a time with a target and, where wanted, a draft model.

    Args:
        clock: Seconds; what drafters and statistics see. Default: ``perf_counter``.
        guard: Whether drafting is passed over while it loses time, by measured times
            (see :mod:`adaptspec.decoding.guard`). Without it every step drafts, which
            is for measurements.
    """

    def __init__(
        self,
        model: LanguageModel,
        draft: LanguageModel | None = None,
        clock: Callable[[], float] | None = None,
        guard: bool = True,
    ) -> None:
        self.model = model
        self.draft = draft
        self.clock = clock or perf_counter
        self.guard = guard
        # Costs of forwards are used once somebody has measured them.
        self._plain_times = PlainTimes(lambda: model.__dict__.get("latency"))
        self._memories: WeakKeyDictionary[Strategy, GuardMemory] = WeakKeyDictionary()

    @property
    def models(self) -> list[LanguageModel]:
        """The target, and the draft model where there is one."""
        return [self.model] if self.draft is None else [self.model, self.draft]

    @property
    def turns(self) -> list[Turns]:
        """Those of the models, which a step takes all of."""
        return [model.turns for model in self.models]

    def guard_memory(self, strategy: Strategy) -> GuardMemory:
        """What is known of a strategy's speed here, across its generations."""
        return self._memories.setdefault(strategy, GuardMemory(self._plain_times))

    def generate(
        self,
        strategy: Strategy,
        ids: Sequence[int],
        controls: Controls,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Generation:
        """Decode after ``ids``; ``on_tokens`` gets each step's tokens as accepted.

        Raises:
            UnavailableStrategyError: if the strategy can't run on this model.
            InvalidPromptError: if the prompt is empty or leaves no room.
            InvalidTreeError: if the strategy proposes what isn't a token tree.
            NoValidTokenError: if no token has a score to be chosen by.
        """
        run = Run(self, strategy, ids, controls)
        for tokens in run:
            if on_tokens is not None:
                on_tokens(tokens)
        return run.result

    def stream(
        self, strategy: Strategy, ids: Sequence[int], controls: Controls
    ) -> Iterator[int]:
        """The tokens one at a time, as soon as they are accepted."""
        for tokens in Run(self, strategy, ids, controls):
            yield from tokens


class Run:
    """One generation: iterate over it for the tokens of each step, then ask ``result``.

    Invariant between steps: the cache holds every committed token but the last.

    Args:
        follow: For measurements of greedy decoding: takes a place in the answer, from
            0, and the target's choice there, and returns the token that is taken. It is
            asked once for each place, in order. None takes the target's choice.
    """

    def __init__(
        self,
        engine: Engine,
        strategy: Strategy,
        ids: Sequence[int],
        controls: Controls,
        follow: Callable[[int, int], int] | None = None,
    ) -> None:
        model = engine.model
        self._engine = engine
        self._follow = follow
        self._model, self._draft = model, engine.draft
        self._strategy = strategy
        self._in_turn(self._look_at_models)
        if not ids:
            raise InvalidPromptError("a prompt must have at least one token, got none")
        self._clock = engine.clock
        self._controls = controls
        self._prompt = len(ids)
        self._room = controls.room(self._prompt)
        if self._room < 1:
            raise InvalidPromptError(
                f"prompt + 1 <= max_length={controls.max_length} must hold, got a "
                f"prompt of {self._prompt}; raise max_length or pass max_new_tokens"
            )
        if model.max_length is not None:
            self._room = min(self._room, model.max_length - self._prompt)
            if self._room < 1:
                raise InvalidPromptError(
                    f"prompt + 1 <= {model.max_length} tokens must hold for "
                    f"{model.name}, got a prompt of {self._prompt}; shorten it, or try "
                    "the model's own generate, which may go on past its positions"
                )
        self._ids = list(ids)
        self._stats = RunStats(prompt_tokens=self._prompt)
        self._finish: Finish | None = None
        limited = controls.with_limit(self._room)
        self._constraint = open_constraint(model, limited, self._prompt)
        processors = Processors(
            limited, self._prompt, model.device, constraint=self._constraint
        )
        prepared = controls.prepared
        pick = None if prepared is None else prepared.pick
        self._sampler = Sampler(processors, controls.seed, self._ids, pick)
        # A lossy rule asks about tokens that may not be kept.
        exact = prepared is not None or self._constraint is not None
        self._may_ask_ahead = processors.pure and not exact
        self._keeps_last = processors.keeps_last
        self._failed: NoValidTokenError | None = None  # at the next token
        self._started = self._clock()
        self._batched_argmax = processors.greedy and processors.trivial
        self._stopping = Stopping(model, controls)
        self._guard: Guard | None = None

    def _in_turn(self, step: Callable[[], Answer]) -> Answer:
        """Run ``step`` while no other thread uses the models."""
        return take_all(self._engine.turns, step)

    def _look_at_models(self) -> None:
        """Take over what their owner has changed, and see whether they serve."""
        for one in self._engine.models:
            heed_fork(one.device)
            one.follow()
        # A model that has changed is copied anew, if it can be copied.
        self._version = self._model.digest, self._model.model
        if reason := type(self._strategy).unavailable(self._model, self._draft):
            raise UnavailableStrategyError(f"{self._strategy.name}: {reason}")

    @property
    def ended(self) -> bool:
        """Whether the last token is decoded."""
        return self._finish is not None

    @property
    def result(self) -> Generation:
        """What was generated (so far, if the iteration was given up)."""
        return Generation(
            self._ids[self._prompt :],
            self._stats,
            self.finish,
            self._sampler.seed,
        )

    @property
    def finish(self) -> Finish:
        """What has ended it, so far."""
        return self._finish or "unfinished"

    def __iter__(self) -> Generator[list[int], None, None]:
        drafter, step, emitted = self._in_turn(self._begin)
        try:
            yield emitted
            while self._finish is None:
                yield self._in_turn(step)
        except GeneratorExit:
            # Garbage collection may be what gives it up, in the middle of any step.
            self._model.turns.soon(drafter.close)
            raise
        except BaseException:
            self._in_turn(drafter.close)
            raise
        self._in_turn(drafter.close)

    def _begin(self) -> tuple[Drafter, Callable[[], list[int]], list[int]]:
        """Read the prompt; the drafter, what decodes a step, and the first token."""
        started = self._clock()
        model = self._model
        level = model.capability.level
        observes = self._strategy.observes(model)
        cache = self._new_cache()
        starting = self._clock()
        drafter = self._strategy.start(self.target(None if level == "plain" else cache))
        if self._engine.guard:
            self._guard = drafter = Guard(
                drafter,
                self._engine.guard_memory(self._strategy),
                self._clock,
                prompt=self._prompt,
                room=self._room,
                reads=self._strategy.requires.draft is not None,
                may_read=self._draft is not None,
                row=model.head_share,
                starting=self._clock() - starting,
            )
        try:
            emitted = self._prefill(drafter, cache, observes)
        except BaseException:
            drafter.close()
            raise
        self._stats.seconds_prefill = self._clock() - started
        return drafter, partial(self._step, drafter, cache, observes, level), emitted

    @property
    def model(self) -> LanguageModel:
        """The target."""
        return self._model

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds."""
        return self._clock

    def target(self, cache: Any) -> Target:
        """What a drafter of this generation is given."""
        return Target(
            model=self._model,
            draft=self._draft,
            cache=cache,
            prompt=tuple(self._ids[: self._prompt]),
            sampling=self._sampler.for_drafts(),
            trees=self._model.capability.level == "tree",
            clock=self._clock,
        )

    def context(self, ids: Sequence[int], step: int) -> Context:
        """What a drafter may propose behind ``ids``, the prompt's included."""
        left = self._room - (len(ids) - self._prompt)
        cached = len(ids) - 1
        depth = min(left - 1, depth_limit(self._model.config, cached))
        nodes = self._controls.max_nodes
        if self._model.max_length is not None:  # some models count rows
            nodes = min(nodes, self._model.max_length - len(ids))
        if cached in self._model.rereads:
            depth = 0
        return Context(ids, depth + 1, nodes, step)

    def verifiable(self, tree: TokenTree, context: Context) -> TokenTree:
        """What of a proposal the model can verify and ``context`` allows.

        Raises:
            InvalidTreeError: if it isn't a token tree.
        """
        tree.check(context.ids[-1], self._model.vocab_size)
        level = self._model.capability.level
        if level != "tree":
            tree = tree.principal_chain() if level == "chain" else tree.select([0])
        return tree.cut(context.max_nodes, context.room - 1)

    def _new_cache(self) -> Any:
        if self._model.capability.level == "plain":
            return self._model.plain_cache()
        return self._model.new_cache(
            self._prompt + self._room + self._controls.max_nodes + 1
        )

    def _prefill(self, drafter: Drafter, cache: Any, observes: Observes) -> list[int]:
        shown = observes.hidden_layers if observes.prefill_hidden != "none" else ()
        rows = max(1, observes.prefill_logits)
        if self._guard is not None:
            rows = self._guard.prompt_rows(rows)
        forward = self._model.prefill(
            list(self._ids),
            cache,
            last=rows,
            hidden_layers=shown,
        )
        last = forward.rows[self._prompt - 1]
        if self._takes_best((), last, forward):
            self._check_chosen([last], forward)
            token = forward.best[last]
        else:
            past = Continuation(self._ids, ())
            token = self._sampler.choose(past, forward.logits[last])
        if self._follow is not None:
            token = self._follow(0, token)
        emitted = self._commit([token])
        seen = forward.hidden
        if observes.prefill_hidden == "last":
            seen = {layer: states[-1:] for layer, states in seen.items()}
        drafter.observe(self._outcome(None, (), emitted, forward, seen))
        return emitted + self._forced_end()

    def _step(
        self, drafter: Drafter, cache: Any, observes: Observes, level: str
    ) -> list[int]:
        digest, module = self._version
        if self._model.digest != digest or self._model.model is not module:
            raise SequenceStateError(
                f"{self._model.name} was changed (weights or adapters) while this "
                "generation ran; finish it before the change, or start again"
            )
        if self._failed is not None:
            raise self._failed
        started = self._clock()
        cached = len(self._ids) - 1
        context = self.context(self._ids, len(self._stats.steps))
        most = context.max_nodes
        tree = drafter.propose(context)  # a guard may have lowered its max_nodes
        proposed = self._clock()
        shaped: Shaped | None = None
        if self._constraint is not None and level != "plain":
            tree.check(self._ids[-1], self._model.vocab_size)
            nodes, depth, chain = context.max_nodes, context.room - 1, level == "chain"
            shaped = self._constraint.shape(tree, nodes, most, depth, chain)
            tree = shaped.tree
        else:
            tree = self.verifiable(tree, context)

        verifying = self._clock()
        if cached in self._model.rereads:
            forward = self._model.reread(self._ids, cache, observes.hidden_layers)
        elif level == "plain":
            forward = self._model.prefill(
                [self._ids[-1]], cache, hidden_layers=observes.hidden_layers
            )
        else:
            forward = self._model.forward_tree(
                tree, cache, hidden_layers=observes.hidden_layers
            )
        self._wait(forward)
        verified = self._clock()

        accepted = self._accept(tree, forward)
        tokens = [tree.tokens[node] for node in accepted.path[1:]]
        if accepted.token is not None:
            tokens.append(accepted.token)
        emitted = self._commit(tokens)
        path = accepted.path[: len(emitted)]
        if level != "plain":
            cache.keep(cached, path)
        committed = self._clock()
        outcome = self._outcome(tree, path, emitted, forward, forward.hidden, shaped)
        drafter.observe(outcome)
        observed = self._clock()
        emitted += self._forced_end()
        if self._guard is not None:
            self._stats.passed_over = self._guard.passed_over
            self._stats.seconds_gained = self._guard.gained
            self._stats.plain_step = self._guard.plain_step
        self._stats.steps.append(
            StepStats(
                proposed=tree.proposed,
                accepted=min(len(accepted.path) - 1, len(emitted)),
                emitted=len(emitted),
                seconds_target=verified - verifying,
                seconds_draft=(proposed - started) + (observed - committed),
                seconds_rest=(verifying - proposed) + (committed - verified),
                depth=tree.depth,
                rows=len(tree),
                forced=sum(0 < node <= outcome.forced for node in path),
            )
        )
        return emitted

    def _outcome(
        self,
        tree: TokenTree | None,
        path: Sequence[int],
        emitted: Sequence[int],
        forward: Forward,
        hidden: dict[int, torch.Tensor],
        shaped: Shaped | None = None,
    ) -> Outcome:
        best = forward.best if self._batched_argmax else ()
        rows, logits = forward.rows, forward.logits
        outcome = Outcome(tree, path, list(emitted), rows, logits, hidden, best)
        if shaped is None:
            return outcome
        return replace(outcome, origins=shaped.origins, forced=shaped.forced)

    def _takes_best(self, tokens: Sequence[int], row: int, forward: Forward) -> bool:
        """Whether the likeliest token of a row is the one to take behind ``tokens``."""
        if forward.decided:
            return True
        if not self._batched_argmax:
            return False
        return self._constraint is None or self._constraint.allows(
            tokens, forward.best[row]
        )

    def _accept(self, tree: TokenTree, forward: Forward) -> Accepted:
        if self._batched_argmax or forward.decided:
            # One read of the device in a step: which tokens were accepted.
            accepted = accept_matching(tree, self._taken(self._best_of(forward)))
            rows = [forward.rows[node] for node in accepted.path]
            sound = self._check_chosen(rows, forward)
            if sound == len(rows):
                return accepted
            return Accepted(accepted.path[: sound + 1], None)
        here = len(self._ids)
        rule = self._strategy.acceptance
        if rule is not None and not self._sampler.greedy and self._may_ask_ahead:
            return accept_typical(
                tree,
                rule,
                distribution=lambda node, tokens: self._sampler.distribution(
                    Continuation(self._ids, tokens), forward.logits[forward.rows[node]]
                ),
                pick=lambda probs, depth: self._sampler.coupled(probs, here + depth),
            )
        if self._sampler.greedy or tree.drawn is Drawn.DETERMINISTIC:
            return accept_matching(
                tree,
                self._taken(
                    lambda node, tokens: self._asked(
                        self._sampler.choose, tokens, forward.logits[forward.rows[node]]
                    )
                ),
            )
        return accept_sampled(
            tree,
            distribution=lambda node, tokens: self._asked(
                self._sampler.distribution, tokens, forward.logits[forward.rows[node]]
            ),
            uniform=lambda depth, attempt: self._sampler.uniform(here + depth, attempt),
            pick=lambda probs, depth: self._sampler.coupled(probs, here + depth),
        )

    def _best_of(self, forward: Forward) -> Callable[[int, Sequence[int]], int | None]:
        """The rows' likeliest tokens; only illegal ones make it mask the scores."""

        def best(node: int, tokens: Sequence[int]) -> int | None:
            row = forward.rows[node]
            if self._takes_best(tokens, row, forward):
                return forward.best[row]
            return self._asked(self._sampler.choose, tokens, forward.logits[row])

        return best

    def _taken(
        self, choose: Callable[[int, Sequence[int]], int | None]
    ) -> Callable[[int, Sequence[int]], int | None]:
        """The same choices, or what is followed in their place."""
        follow = self._follow
        if follow is None:
            return choose

        def taken(node: int, tokens: Sequence[int]) -> int | None:
            own = choose(node, tokens)
            place = len(self._ids) - self._prompt + len(tokens)
            return None if own is None else follow(place, own)

        return taken

    def _asked(
        self,
        ask: Callable[[Sequence[int], torch.Tensor], Answer],
        tokens: Sequence[int],
        logits: torch.Tensor,
    ) -> Answer | None:
        """What the target says after accepted ``tokens``, None if they end the output.

        Processors that keep state thus see each emitted token's place once, in order.
        Where no token can be chosen behind accepted ones, these are emitted first.
        """
        past = Continuation(self._ids, tokens)
        if tokens and self._stopping(past) is not None:
            return None
        try:
            return ask(past, logits)
        except NoValidTokenError as error:
            if not tokens:
                raise
            self._failed = error
            return None

    def _check_chosen(self, rows: Sequence[int], forward: Forward) -> int:
        """How many of an accepted path's ``rows`` have a likeliest token.

        Raises:
            NoValidTokenError: if the first has none; of another it is kept for later.
        """
        if forward.decided:  # a recording has no logits
            return len(rows)
        for place, value in enumerate(forward.largest(rows)):
            if not choosable(value):
                position = len(self._ids) + place
                error = no_valid_token(position, forward.logits[rows[place]])
                if place == 0:
                    raise error
                self._failed = error
                return place
        return len(rows)

    def _commit(self, tokens: Sequence[int]) -> list[int]:
        """Append tokens up to the output's end; return those that are part of it."""
        emitted = []
        for token in tokens:
            self._ids.append(token)
            emitted.append(token)
            self._finish = self._stopping(self._ids)
            if self._finish is None and len(self._ids) - self._prompt >= self._room:
                self._finish = "length"
            if self._finish is not None:
                break
        if self._constraint is not None:
            self._constraint.commit(emitted)
            if self._constraint.finished and not self._controls.eos_token_ids:
                self._finish = self._finish or "stop"
        limit = self._controls.max_time
        if limit is not None and self._finish is None:
            if self._clock() - self._started > limit:
                self._finish = "time"
        self._stats.new_tokens += len(emitted)
        return emitted

    def _forced_end(self) -> list[int]:
        """The end of sequence where a grammar allows nothing else: no forward needed.

        Of several, and where a control may forbid it, the target's scores decide.
        """
        ends = set(self._controls.eos_token_ids)
        if self._finish is not None or len(ends) != 1 or not self._keeps_last:
            return []
        if self._constraint is None or not self._constraint.finished:
            return []
        return self._commit([*ends])

    def _wait(self, forward: Forward) -> None:
        """Wait for a device that works on its own, by what is read of it anyway."""
        if self._model.device.type == "cpu":
            return
        if self._batched_argmax:
            _ = forward.best
        elif self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
