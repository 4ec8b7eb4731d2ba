"""Every installed strategy on every architecture, against the model's own generate."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.errors import UnavailableStrategyError
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.params import Scalar
from adaptspec.testing.fakes import WINDOW, hf_greedy, random_ids, tiny_module
from adaptspec.testing.heads import attach_tiny_heads
from adaptspec.testing.strategies import (
    plain_strategy,
    plainly,
    record,
    target_and_draft,
)

TREES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma3",
    "mistral",
    "gpt2",
    "gpt_neox",
    "phi",
    "opt",
    "mixtral",
    "falcon",
)
CHAINS = ("bloom",)
PLAIN = ("mamba",)

NEW_TOKENS = 20
PROMPTS = (
    tuple(random_ids(1, seed=1)),
    tuple(random_ids(WINDOW - 1, seed=2)),
    (*random_ids(9, seed=3), *random_ids(9, seed=3)),
)
# Deterministic under sampling, so that the output is plain sampling's, token for token.
DETERMINISTIC: dict[str, dict[str, Scalar]] = {
    "autoregressive": {},
    "prompt_lookup": {},
    "draft_model": {"draft_sampling": "coupled"},
    "draft_tree": {"mode": "deterministic"},
}
HOST = Host.installed()
STRATEGIES = sorted(HOST.strategies)


@functools.cache
def reference(architecture: str, prompt: tuple[int, ...]) -> list[int]:
    """What the model's own ``generate`` emits."""
    return hf_greedy(target_and_draft(architecture)[0], prompt, NEW_TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TREES)
def test_models_with_plain_attention_verify_trees(architecture: str) -> None:
    model, draft = target_and_draft(architecture)
    assert (model.capability.level, model.capability.reason) == ("tree", "")
    assert draft.capability.level == "tree"


@pytest.mark.parametrize("architecture", CHAINS)
def test_models_with_biases_by_distance_verify_chains_and_say_why(
    architecture: str,
) -> None:
    capability = target_and_draft(architecture)[0].capability
    assert capability.level == "chain"
    assert capability.reason.startswith("trees, chains fail: ")


@pytest.mark.parametrize("architecture", PLAIN)
def test_recurrent_models_decode_plainly_and_say_why(architecture: str) -> None:
    capability = target_and_draft(architecture)[0].capability
    assert capability.level == "plain"
    assert "rolled back" in capability.reason


@pytest.mark.parametrize("architecture", [*TREES, *CHAINS, *PLAIN])
def test_random_models_say_many_different_things(architecture: str) -> None:
    """Else an equal output would prove little."""
    said = [set(reference(architecture, prompt)) for prompt in PROMPTS]
    assert max(map(len, said)) >= 5
    assert said[0] != said[1]


def refusal(strategy: str, architecture: str) -> str | None:
    """What must stand in the refusal, by name of strategy and architecture."""
    if architecture in PLAIN and strategy != "autoregressive":
        return "roll(ed)? back"
    if architecture in CHAINS and strategy in ("draft_tree", "lookahead"):
        return "tree attention"
    if strategy == "universal_draft":  # its own tests give the models tokenizers
        return "tokenizers"
    return None


@pytest.mark.parametrize("architecture", [*TREES, *CHAINS, *PLAIN])
@pytest.mark.parametrize("name", STRATEGIES)
def test_greedy_output_is_the_models_own_or_the_strategy_refuses(
    name: str, architecture: str
) -> None:
    model, draft = target_and_draft(architecture)
    if HOST.strategy(name).requires.heads is not None:
        model = copy.copy(model)  # others share the target, and it has no heads
        model.heads = {}
        attach_tiny_heads(model)
    engine = Engine(model, draft)
    strategy = HOST.strategy(name)()
    controls = Controls.greedy(NEW_TOKENS)
    if (reason := refusal(name, architecture)) is not None:
        with pytest.raises(UnavailableStrategyError, match=reason):
            engine.generate(strategy, PROMPTS[0], controls)
        return
    for prompt in PROMPTS:
        run = engine.generate(strategy, prompt, controls)
        assert run.token_ids == reference(architecture, prompt)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*TREES, *CHAINS, *PLAIN])
def test_bfloat16_leaves_generates_output_at_near_ties_only(architecture: str) -> None:
    module = tiny_module(architecture).to(torch.bfloat16)
    # Of the same weights: which token is the likelier without bfloat16's rounding.
    exact = copy.deepcopy(module).float()
    model = LanguageModel(module)
    for name in ("autoregressive", "token_recycling", "hybrid"):
        strategy = HOST.strategy(name)
        if strategy.unavailable(model, None):
            continue
        for prompt in PROMPTS:
            theirs = hf_greedy(model, prompt, NEW_TOKENS)
            run = Engine(model).generate(
                strategy(), prompt, Controls.greedy(NEW_TOKENS)
            )
            pairs = list(zip(run.token_ids, theirs, strict=True))
            same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if len(same) == len(pairs):
                continue
            text = [*prompt, *theirs[: len(same)]]
            with torch.inference_mode():
                logits = exact(torch.tensor([text])).logits[0, -1]
            ours, other = pairs[len(same)]
            assert abs(logits[ours] - logits[other]) <= 0.1 * logits.std()


@pytest.mark.parametrize("name", ["draft_model", "draft_tree"])
@pytest.mark.parametrize("architecture", TREES)
def test_some_drafts_are_accepted_and_some_rejected(
    name: str, architecture: str
) -> None:
    """Else the tests above would not have gone through both."""
    model, draft = target_and_draft(architecture)
    strategy = HOST.strategy(name)()
    runs = [
        record(strategy, model, draft, prompt, Controls.greedy(NEW_TOKENS))[0]
        for prompt in PROMPTS
    ]
    accepted = sum(run.stats.accepted for run in runs)
    assert 0 < accepted < sum(run.stats.proposed for run in runs)


def plain_sampling(architecture: str, ids: Sequence[int], seed: int) -> list[int]:
    """Plain sampling under the controls of the tests below."""
    return plainly(architecture, ids, sampling(seed))


def sampling(seed: int) -> Controls:
    """Sampling with many controls, processors of the ids among them."""
    return Controls(
        max_new_tokens=NEW_TOKENS,
        temperature=0.8,
        top_k=30,
        top_p=0.95,
        repetition_penalty=1.2,
        logits_processor=LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)]),
        seed=seed,
    )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "bloom"])
@pytest.mark.parametrize("name", sorted(DETERMINISTIC))
def test_sampled_output_of_deterministic_drafts_is_plain_samplings(
    name: str, architecture: str
) -> None:
    if refusal(name, architecture) is not None:
        pytest.skip("refused, as tested above")
    cls = HOST.strategy(name)
    strategy = cls(cls.Params.parse(DETERMINISTIC[name]))
    engine = Engine(*target_and_draft(architecture))
    for seed, prompt in enumerate(PROMPTS):
        run = engine.generate(strategy, prompt, sampling(seed))
        assert run.token_ids == plain_sampling(architecture, prompt, seed)


def test_seeds_and_controls_change_the_sampled_output() -> None:
    prompt = PROMPTS[2]
    assert plain_sampling("llama", prompt, 0) != plain_sampling("llama", prompt, 1)
    sampled = plain_sampling("llama", prompt, 0)
    pairs = list(itertools.pairwise(sampled))
    assert len(set(pairs)) == len(pairs), "no_repeat_ngram_size=2 was not honoured"


def test_greedy_with_processors_is_what_generate_emits_with_them() -> None:
    model = target_and_draft("qwen2")[0]
    controls = Controls(
        max_new_tokens=NEW_TOKENS,
        repetition_penalty=1.3,
        logits_processor=LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)]),
    )
    for prompt in PROMPTS:
        output = model.source.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            repetition_penalty=1.3,
            no_repeat_ngram_size=2,
            pad_token_id=0,
        )
        run = Engine(model).generate(plain_strategy(), prompt, controls)
        assert run.token_ids == output[0, len(prompt) :].tolist()
