"""The contract of every strategy, to be subclassed in a plugin's tests."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, ClassVar

import pytest
import torch

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Generation, Run
from adaptspec.decoding.processing import Processors
from adaptspec.decoding.sampling import Sampler
from adaptspec.errors import InvalidParamsError, UnavailableStrategyError
from adaptspec.model.language_model import LanguageModel
from adaptspec.params import Params, Scalar
from adaptspec.strategy import Context, Drafter, Outcome, Strategy, Target
from adaptspec.testing.fakes import (
    POSITIONS,
    WINDOW,
    ScriptedStrategy,
    hf_greedy,
    noisy_draft,
    random_ids,
    tiny_model,
)
from adaptspec.token_tree import Drawn, TokenTree

Setting = Mapping[str, Scalar]

NEW_TOKENS = 16
PROMPTS: tuple[tuple[int, ...], ...] = (
    (7,),
    tuple(random_ids(5, seed=1)),
    tuple(random_ids(2 * WINDOW + 3, seed=2)),
    (*random_ids(6, seed=3), *random_ids(6, seed=3)),
)
# A chance of the right distribution being refused; seeds are fixed, so it stays a pass.
SIGNIFICANCE_LEVEL = 1e-4


class StrategyContract:
    """What every strategy promises, checked on tiny random models.

    Subclass it in a test module under a name that begins with ``Test``::

        class TestEcho(StrategyContract):
            strategy = Echo
            params = ({}, {"window": 3})

    Attributes:
        strategy: The class under test.
        params: Settings tried in every test; each parameter's bounds are tried too.
        architectures: Names of :data:`adaptspec.testing.fakes.ARCHITECTURES`.
        draws: Samples for the test of sampled distributions.
    """

    strategy: ClassVar[type[Strategy]]
    params: ClassVar[Sequence[Setting]] = ({},)
    architectures: ClassVar[Sequence[str]] = ("llama", "mistral", "gpt2")
    draws: ClassVar[int] = 300

    def models(self, architecture: str) -> tuple[LanguageModel, LanguageModel]:
        """The target and draft of every test but those of :meth:`toys`.

        Override it for a strategy that asks something else of the draft, such as
        another tokenizer; the target must keep its weights, and a call must give what
        the one before gave.
        """
        return target_and_draft(architecture)

    def toys(self) -> tuple[LanguageModel, LanguageModel]:
        """The target and draft of the frequency tests; override it as :meth:`models`.

        The target's distribution over its five tokens is enumerated.
        """
        return toy_pair()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each setting, bound and architecture."""
        if "setting" in metafunc.fixturenames:
            metafunc.parametrize("setting", list(self.params), ids=_describe)
        if "bound" in metafunc.fixturenames:
            bounds = bound_settings(self.strategy.Params)
            metafunc.parametrize("bound", bounds, ids=_describe)
        if "architecture" in metafunc.fixturenames:
            metafunc.parametrize("architecture", list(self.architectures))

    def test_parameters_are_described_and_their_defaults_are_valid(self) -> None:
        self.strategy.Params.parse({})
        undescribed = [
            s.name for s in self.strategy.Params.specs() if not s.description
        ]
        assert undescribed == []

    def test_it_says_in_words_why_it_cannot_run(self) -> None:
        model = self.models("mamba")[0]
        for draft in (None, model):
            reason = self.strategy.unavailable(model, draft)
            if reason is None:
                continue
            assert reason.strip()
            with pytest.raises(UnavailableStrategyError, match=self.strategy.name):
                self._decode({}, (5,), Controls.greedy(2), "mamba", draft)

    def test_it_runs_on_at_least_one_of_the_architectures(self) -> None:
        reasons = {
            name: self.strategy.unavailable(*self.models(name))
            for name in self.architectures
        }
        assert None in reasons.values(), reasons

    def test_greedy_output_is_what_the_models_own_generate_emits(
        self, setting: Setting, architecture: str
    ) -> None:
        self._need_lossless(architecture)
        for prompt in PROMPTS:
            expected = own_greedy(architecture, prompt)
            found = self._decode(setting, prompt, greedy(), architecture)
            assert found.token_ids == expected, prompt

    def test_greedy_output_is_the_same_at_every_bound(self, bound: Setting) -> None:
        architecture = self._runnable()
        self._need_lossless(architecture)
        for prompt in PROMPTS[2:]:
            expected = own_greedy(architecture, prompt)
            found = self._decode(bound, prompt, greedy(), architecture)
            assert found.token_ids == expected, prompt

    def test_sampled_output_is_plain_samplings_unless_the_draft_is_sampled(
        self, setting: Setting
    ) -> None:
        architecture = self._runnable()
        self._need_lossless(architecture)
        controls = sampled(seed=3)
        for prompt in PROMPTS[1:]:
            plain = plainly(architecture, prompt, controls)
            found, trees = self._record(setting, prompt, controls, architecture)
            if all(tree.drawn is Drawn.DETERMINISTIC for tree in trees):
                assert found.token_ids == plain, prompt
            else:
                again, _ = self._record(setting, prompt, controls, architecture)
                assert found.token_ids == again.token_ids, prompt

    def test_sampled_drafts_leave_the_distribution_of_the_output_as_it_is(
        self, setting: Setting
    ) -> None:
        self._need_lossless(self._runnable())
        model, draft = self.toys()
        prompt = [1, 4, 2]
        expected = toy_distribution(model, prompt, temperature=1.5)
        seen: Counter[tuple[int, ...]] = Counter()
        strategy = self.strategy(self.strategy.Params.parse(setting))
        for seed in range(self.draws):
            controls = Controls(max_new_tokens=3, temperature=1.5, seed=seed)
            run, trees = record(strategy, model, draft, prompt, controls)
            if seed == 9 and all(tree.drawn is Drawn.DETERMINISTIC for tree in trees):
                pytest.skip("deterministic drafts: compared token for token elsewhere")
            seen[tuple(run.token_ids[1:])] += 1
        assert fits(seen, expected)

    def test_a_processor_that_keeps_state_is_asked_once_for_each_emitted_token(
        self, setting: Setting, architecture: str
    ) -> None:
        if reason := self.strategy.unavailable(*self.models(architecture)):
            pytest.skip(reason)
        for most, temperature in itertools.product((3, NEW_TOKENS), (0.0, 2.0)):
            grammar = Grammar(end=1, most=most)
            controls = Controls(
                max_new_tokens=NEW_TOKENS,
                temperature=temperature,
                logits_processor=[grammar],
                eos_token_ids=(1,),
                seed=7,
            )
            found = self._decode(setting, PROMPTS[3], controls, architecture)
            grammar.check(PROMPTS[3], found.token_ids)

    def test_the_same_seed_gives_the_same_proposals(self, setting: Setting) -> None:
        architecture = self._runnable()
        for controls in (greedy(), sampled(seed=5)):
            runs = [
                self._record(setting, PROMPTS[3], controls, architecture)
                for _ in range(2)
            ]
            tokens = [run.token_ids for run, _ in runs]
            shapes = [
                [(list(t.tokens), list(t.parents), t.drawn) for t in trees]
                for _, trees in runs
            ]
            assert tokens[0] == tokens[1]
            assert shapes[0] == shapes[1]

    def test_proposals_are_trees_in_hostile_contexts(self, setting: Setting) -> None:
        architecture = self._runnable()
        for ids in hostile_prompts():
            for room, max_nodes in ((1, 128), (2, 128), (64, 0), (64, 1), (64, 128)):
                self._propose(setting, architecture, ids, room, max_nodes)

    def test_output_ends_at_the_limit_of_new_tokens(self, setting: Setting) -> None:
        architecture = self._runnable()
        self._need_lossless(architecture)
        expected = own_greedy(architecture, PROMPTS[3])
        for limit in (1, 2, 3, NEW_TOKENS - 1):
            found = self._decode(
                setting, PROMPTS[3], Controls.greedy(limit), architecture
            )
            assert (found.token_ids, found.finish) == (expected[:limit], "length")

    def test_output_ends_at_the_models_last_position(self, setting: Setting) -> None:
        architecture = self._runnable()
        self._need_lossless(architecture)
        for missing in (1, 2, 5):
            prompt = tuple(random_ids(POSITIONS - missing, seed=missing))
            expected = plainly(architecture, prompt, greedy())
            found = self._decode(setting, prompt, greedy(), architecture)
            assert found.token_ids == expected
            assert len(found.token_ids) == missing

    def test_output_ends_at_eos_in_the_middle(self, setting: Setting) -> None:
        architecture = self._runnable()
        self._need_lossless(architecture)
        for prompt in PROMPTS[1:]:
            plain = own_greedy(architecture, prompt)
            for at in (0, 2, NEW_TOKENS // 2):
                controls = Controls.greedy(NEW_TOKENS, (plain[at], 0))
                found = self._decode(setting, prompt, controls, architecture)
                assert found.token_ids == until(plain, (plain[at], 0))
                assert found.finish == "eos"

    def test_sequences_one_after_the_other_come_out_as_from_fresh_instances(
        self, setting: Setting
    ) -> None:
        architecture = self._runnable()
        model, draft = self.models(architecture)
        engine = Engine(model, draft, guard=False)
        used = self.strategy(self.strategy.Params.parse(setting))
        controls = sampled(seed=1) if self.strategy.lossless else greedy()
        for prompt in (PROMPTS[3], PROMPTS[1], PROMPTS[3]):
            fresh = self._decode(setting, prompt, controls, architecture)
            assert engine.generate(used, prompt, controls).token_ids == fresh.token_ids

    def test_sequences_in_turns_come_out_as_each_alone(self, setting: Setting) -> None:
        """Two of one prompt and one of another, step by step and of one instance."""
        architecture = self._runnable()
        model, draft = self.models(architecture)
        engine = Engine(model, draft, guard=False)
        shared = self.strategy(self.strategy.Params.parse(setting))
        controls = sampled(seed=1) if self.strategy.lossless else greedy()
        prompts = (PROMPTS[3], PROMPTS[1], PROMPTS[3])
        runs = [Run(engine, shared, prompt, controls) for prompt in prompts]
        left = [iter(run) for run in runs]
        while left:
            left = [steps for steps in left if next(steps, None) is not None]
        for prompt, run in zip(prompts, runs, strict=True):
            alone = self._decode(setting, prompt, controls, architecture)
            assert run.result.token_ids == alone.token_ids, prompt

    def test_a_run_given_up_leaves_the_strategy_usable(self, setting: Setting) -> None:
        architecture = self._runnable()
        self._need_lossless(architecture)
        engine = Engine(*self.models(architecture), guard=False)
        strategy = self.strategy(self.strategy.Params.parse(setting))
        calls = itertools.count()

        def interrupt(tokens: list[int]) -> None:
            if next(calls) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.generate(strategy, PROMPTS[3], greedy(), interrupt)
        found = engine.generate(strategy, PROMPTS[1], greedy())
        assert found.token_ids == own_greedy(architecture, PROMPTS[1])

    def test_a_sequence_can_be_closed_before_it_began(self, setting: Setting) -> None:
        model, draft = self.models(self._runnable())
        strategy = self.strategy(self.strategy.Params.parse(setting))
        strategy.start(_target(model, draft, PROMPTS[1], greedy())).close()

    def _runnable(self) -> str:
        for name in self.architectures:
            if self.strategy.unavailable(*self.models(name)) is None:
                return name
        pytest.fail("the strategy runs on none of the architectures")

    def _need_lossless(self, architecture: str) -> None:
        if not self.strategy.lossless:
            pytest.skip("declared lossy")
        reason = self.strategy.unavailable(*self.models(architecture))
        if reason is not None:
            pytest.skip(reason)

    def _decode(
        self,
        setting: Setting,
        prompt: Sequence[int],
        controls: Controls,
        architecture: str,
        draft: LanguageModel | None = None,
    ) -> Generation:
        model, own_draft = self.models(architecture)
        engine = Engine(model, draft or own_draft, guard=False)
        strategy = self.strategy(self.strategy.Params.parse(setting))
        return engine.generate(strategy, prompt, controls)

    def _record(
        self,
        setting: Setting,
        prompt: Sequence[int],
        controls: Controls,
        architecture: str,
    ) -> tuple[Generation, list[TokenTree]]:
        strategy = self.strategy(self.strategy.Params.parse(setting))
        return record(strategy, *self.models(architecture), prompt, controls)

    def _propose(
        self,
        setting: Setting,
        architecture: str,
        ids: Sequence[int],
        room: int,
        max_nodes: int,
    ) -> None:
        """One proposal from a drafter run by hand, as the engine would."""
        model, draft = self.models(architecture)
        strategy = self.strategy(self.strategy.Params.parse(setting))
        target = _target(model, draft, ids, greedy())
        observes = strategy.observes(model)
        drafter = strategy.start(target)
        assert target.cache is not None
        forward = model.prefill(
            ids,
            target.cache,
            last=max(1, observes.prefill_logits),
            hidden_layers=(
                observes.hidden_layers if observes.prefill_hidden != "none" else ()
            ),
        )
        token = int(forward.logits[forward.rows[len(ids) - 1]].argmax())
        hidden = forward.hidden
        if observes.prefill_hidden == "last":
            hidden = {layer: states[-1:] for layer, states in hidden.items()}
        drafter.observe(
            Outcome(None, (), [token], forward.rows, forward.logits, hidden)
        )
        committed = [*ids, token]
        context = Context(list(committed), room, max_nodes, 0)
        tree = drafter.propose(context)
        tree.check(token, model.vocab_size)
        assert list(context.ids) == committed, "propose changed context.ids"
        assert target.cache.length == len(ids), "propose changed the target's cache"
        drafter.close()


class Grammar:
    """A logits processor that moves on with each call, as grammars' matchers do.

    Tokens must alternate between even and odd ids above 1, and end after ``most``.

    Args:
        end: The token that ends the text.
    """

    def __init__(self, end: int, most: int = 1 << 30) -> None:
        self.calls: list[list[int]] = []
        self._end, self._most = end, most

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask what may not come after as many tokens as there were calls.

        Raises:
            RuntimeError: if asked for more than the whole text.
        """
        assert input_ids.dim() == 2
        assert len(input_ids) == len(scores) == 1
        step = len(self.calls)
        if step > self._most:
            raise RuntimeError("the text is complete")
        self.calls.append(input_ids[0].tolist())
        allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
        if step == self._most:
            allowed[self._end] = True
        else:
            allowed[2 + step % 2 :: 2] = True
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def check(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """Fail unless each of ``tokens`` was asked for once, in order."""
        whole = [*prompt, *tokens]
        assert self.calls == [whole[: len(prompt) + n] for n in range(len(tokens))]
        for step, token in enumerate(tokens):
            if step == self._most:
                assert token == self._end
            else:
                assert token > 1
                assert token % 2 == step % 2


def bound_settings(params: type[Params]) -> list[dict[str, Scalar]]:
    """The defaults, then each parameter at each end of its range, or at each choice.

    Ends the tuner tries must be valid beside the other defaults; ends that only
    validation knows (``ge``, ``le``) are left out where another parameter forbids them.

    Raises:
        InvalidParamsError: if an end that the tuner tries isn't valid.
    """
    settings: list[dict[str, Scalar]] = [{}]
    for spec in params.specs():
        others: dict[str, Scalar] = {}
        tuned: list[Scalar] = list(spec.choices)
        if spec.tunable is not None:
            others = {name: values[0] for name, values in spec.tunable.when.items()}
            for end in (spec.tunable.low, spec.tunable.high):
                if end is not None:
                    tuned.append(int(end) if spec.kind == "int" else float(end))
        for value in tuned:
            setting = {**others, spec.name: value}
            params.parse(setting)
            settings.append(setting)
        for value in _limits(params, spec.name):
            setting = {**others, spec.name: value}
            try:
                params.parse(setting)
            except InvalidParamsError:
                continue
            settings.append(setting)
    return [s for i, s in enumerate(settings) if s not in settings[:i]]


def _limits(params: type[Params], name: str) -> list[Scalar]:
    limits: list[Scalar] = []
    for constraint in params.model_fields[name].metadata:
        for side in ("ge", "le"):
            limit = getattr(constraint, side, None)
            if isinstance(limit, (int, float)):
                limits.append(limit)
    return limits


@functools.cache
def target_and_draft(architecture: str) -> tuple[LanguageModel, LanguageModel]:
    """A tiny model and a draft for it that is often, not always, right."""
    model = tiny_model(architecture)
    return model, noisy_draft(model)


@functools.cache
def toy_pair() -> tuple[LanguageModel, LanguageModel]:
    """A target and a rather different draft over five tokens, for frequency tests."""
    model = tiny_model("llama", seed=3, vocab_size=5, num_hidden_layers=1)
    return model, noisy_draft(model, noise=0.2)


@functools.cache
def own_greedy(architecture: str, prompt: tuple[int, ...]) -> list[int]:
    """What the model's own ``generate`` emits."""
    return hf_greedy(target_and_draft(architecture)[0], prompt, NEW_TOKENS)


def until(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """``tokens`` up to the first of ``ends``, which is part of it."""
    for at, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: at + 1])
    return list(tokens)


def plainly(architecture: str, prompt: Sequence[int], controls: Controls) -> list[int]:
    """What plain decoding emits under ``controls``."""
    engine = Engine(target_and_draft(architecture)[0], guard=False)
    return engine.generate(plain_strategy(), prompt, controls).token_ids


def plain_strategy() -> ScriptedStrategy:
    """Plain decoding."""
    return ScriptedStrategy(lambda context: TokenTree.root_only(context.ids[-1]))


def greedy() -> Controls:
    """The most likely tokens."""
    return Controls.greedy(NEW_TOKENS)


def sampled(seed: int) -> Controls:
    """Sampling with most controls in force."""
    return Controls(
        max_new_tokens=NEW_TOKENS,
        temperature=0.8,
        top_k=20,
        top_p=0.95,
        repetition_penalty=1.1,
        seed=seed,
    )


def record(
    strategy: Strategy,
    model: LanguageModel,
    draft: LanguageModel | None,
    prompt: Sequence[int],
    controls: Controls,
) -> tuple[Generation, list[TokenTree]]:
    """Decode and keep every proposal."""
    trees: list[TokenTree] = []

    class Recorder(Drafter):
        def __init__(self, inner: Drafter) -> None:
            self._inner = inner

        def propose(self, context: Context) -> TokenTree:
            tree = self._inner.propose(context)
            trees.append(tree)
            return tree

        def observe(self, outcome: Outcome) -> None:
            self._inner.observe(outcome)

        def close(self) -> None:
            self._inner.close()

    def start(self: Any, target: Target) -> Drafter:
        return Recorder(strategy.start(target))

    recorded: type[Strategy] = type("Recorded", (type(strategy),), {"start": start})
    run = Engine(model, draft, guard=False).generate(
        recorded(strategy.params), prompt, controls
    )
    return run, trees


def hostile_prompts() -> list[list[int]]:
    """Prompts that drafters trip over."""
    return [
        [3],
        [0, 0],
        [9] * 40,
        [5, 6] * 20,
        random_ids(2 * WINDOW, seed=8),
        random_ids(POSITIONS - 1, seed=9),
    ]


@torch.inference_mode()
def toy_distribution(
    model: LanguageModel, prompt: Sequence[int], temperature: float
) -> dict[tuple[int, ...], float]:
    """The exact distribution of the second and third token after ``prompt``."""
    tokens = range(model.vocab_size)

    def after(ids: Sequence[int]) -> list[float]:
        logits = model.source(torch.tensor([list(ids)])).logits[0, -1]
        probs: list[float] = (logits.double() / temperature).softmax(-1).tolist()
        return probs

    probs: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for first, first_chance in zip(tokens, after(prompt), strict=True):
        second_distribution = after([*prompt, first])
        for second, second_chance in zip(tokens, second_distribution, strict=True):
            third_distribution = after([*prompt, first, second])
            for third, third_chance in zip(tokens, third_distribution, strict=True):
                probs[second, third] += first_chance * second_chance * third_chance
    return probs


def fits(
    seen: Mapping[tuple[int, ...], int], probs: Mapping[tuple[int, ...], float]
) -> bool:
    """Whether a chi-square test lets the counts pass as draws from ``probs``."""
    return chi_square(seen, probs) > SIGNIFICANCE_LEVEL


def chi_square(
    seen: Mapping[tuple[int, ...], int], probs: Mapping[tuple[int, ...], float]
) -> float:
    """The chance of counts as far from ``probs`` as these, or farther.

    Outcomes expected fewer than five times are counted together.
    """
    from scipy.stats import chisquare

    total = sum(seen.values())
    common = [key for key, chance in probs.items() if chance * total >= 5]
    observed = [seen.get(key, 0) for key in common]
    expected = [probs[key] * total for key in common]
    observed.append(total - sum(observed))
    expected.append(total - sum(expected))
    if expected[-1] < 5:  # too rare to be a class of its own
        rest_seen, rest_expected = observed.pop(), expected.pop()
        observed[-1] += rest_seen
        expected[-1] += rest_expected
    return float(chisquare(observed, expected).pvalue)


def _target(
    model: LanguageModel,
    draft: LanguageModel | None,
    prompt: Sequence[int],
    controls: Controls,
) -> Target:
    processors = Processors(controls, len(prompt), model.device)
    return Target(
        model=model,
        draft=draft,
        cache=model.new_cache(len(prompt) + 200),
        prompt=tuple(prompt),
        sampling=Sampler(processors, controls.seed),
        trees=model.capability.level == "tree",
        clock=perf_counter,
    )


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "defaults"
    return str(value)
