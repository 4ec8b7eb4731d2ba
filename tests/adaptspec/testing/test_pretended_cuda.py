"""Decoding as on a GPU, traced where there is none: devices, reads, captures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.host import Host
from adaptspec.model import step_inputs
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import (
    hf_greedy,
    random_ids,
    tiny_module,
    tiny_tokenizer,
)
from adaptspec.testing.heads import attach_tiny_heads
from adaptspec.testing.pretended_cuda import (
    CaptureError,
    MixedDevicesError,
    PretendedCuda,
    pretended,
)
from speakers import json_tokenizer

PROMPT = random_ids(8) * 2
TOKENS = 12
GREEDY = Controls.greedy(TOKENS)
SAMPLED = Controls(max_new_tokens=TOKENS, temperature=0.8, top_k=20, seed=1)
# Read the device for nothing but the accepted tokens.
READ_ONCE = ("autoregressive", "lookahead", "prompt_lookup", "suffix")


def on_gpu(
    cuda: PretendedCuda, architecture: str, tokenizer: Any = None
) -> LanguageModel:
    tokenizer = tokenizer or tiny_tokenizer()
    module = cuda.put(tiny_module(architecture, vocab_size=len(tokenizer)))
    return LanguageModel(module, tokenizer)


def decoded(
    name: str, controls: Controls, model: LanguageModel, draft: LanguageModel | None
) -> Any:
    strategy = Host.installed().strategy(name)()
    return Engine(model, draft, guard=False).generate(strategy, PROMPT, controls)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_every_strategy_runs_as_on_a_gpu(architecture: str) -> None:
    """Greedy and sampled: the CPU's tokens, from replayed graphs."""
    plain = LanguageModel(tiny_module(architecture), tiny_tokenizer())
    truth = hf_greedy(plain, PROMPT, TOKENS)
    drawn = decoded("autoregressive", SAMPLED, plain, None).token_ids
    ran = set()
    with PretendedCuda() as cuda:
        model, draft = on_gpu(cuda, architecture), on_gpu(cuda, architecture)
        attach_tiny_heads(model)
        assert model.device.type == "cuda"
        assert model.capability.level == "tree"
        assert model.shapes.kind == "graphs", model.shapes
        for name, strategy in sorted(Host.installed().strategies.items()):
            if strategy.unavailable(model, draft):
                continue
            before = cuda.replays
            run = decoded(name, GREEDY, model, draft)
            assert run.token_ids == truth, name
            assert cuda.replays - before >= len(run.stats.steps), name
            sampled = decoded(name, SAMPLED, model, draft)
            if name in READ_ONCE:  # proposals aren't drawn: the same noise
                assert sampled.token_ids == drawn, name
            ran.add(name)
    assert {*READ_ONCE, "draft_model", "draft_tree", "hybrid", "medusa"} <= ran
    assert "token_recycling" in ran


@pytest.mark.slow
def test_a_step_reads_the_device_once() -> None:
    with PretendedCuda() as cuda:
        model = on_gpu(cuda, "llama")
        for name in READ_ONCE:
            decoded(name, GREEDY, model, None)  # captures what it needs
            with cuda.counted() as reads:
                run = decoded(name, GREEDY, model, None)
                forwards = len(run.stats.steps) + 1  # the prompt's
                assert reads() == forwards, name


def bytes_tokenizer() -> Any:
    """A token for each byte."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        [],
        trainers.BpeTrainer(
            vocab_size=257,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, eos_token="<end>"
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["text", "intersection"])
def test_a_draft_of_another_tokenizer_runs_as_on_a_gpu(mode: str) -> None:
    with PretendedCuda() as cuda:
        model = on_gpu(cuda, "llama", json_tokenizer())
        draft = on_gpu(cuda, "llama", bytes_tokenizer())
        strategy = Host.installed().create("universal_draft", {"mode": mode})
        prompt = model.encode('{"status": "active", "count": 12}', raw=True)
        for controls in (GREEDY, SAMPLED):
            run = Engine(model, draft, guard=False).generate(strategy, prompt, controls)
            assert run.stats.proposed > 0
            if controls is GREEDY:
                found = run.token_ids
    size = len(json_tokenizer())
    plain = LanguageModel(tiny_module("llama", vocab_size=size), json_tokenizer())
    assert found == hf_greedy(plain, prompt, TOKENS)


@pytest.mark.slow
def test_a_grammar_is_held_as_on_a_gpu() -> None:
    tokenizer = json_tokenizer()
    controls = Controls(
        max_new_tokens=12, regex='\\{"a": [0-9]+\\}', eos_token_ids=(0,), seed=2
    )
    plain = LanguageModel(tiny_module("llama", vocab_size=len(tokenizer)), tokenizer)
    expected = decoded("prompt_lookup", controls, plain, None).token_ids
    assert expected
    with PretendedCuda() as cuda:
        model = on_gpu(cuda, "llama", tokenizer)
        found = decoded("prompt_lookup", controls, model, None).token_ids
    assert found == expected


@pytest.mark.parametrize(
    "mixed",
    [
        lambda there: there + torch.ones(3),
        lambda there: torch.cat([there, torch.ones(3)]),
        lambda there: there.index_select(0, torch.tensor([1])),
        lambda there: torch.ones(3)[there.long()],
        lambda there: torch.where(there > 0, there, torch.zeros(3)),
        lambda there: torch.stack([there[0], torch.tensor(1.0)]),
        lambda there: nn.Linear(3, 2)(there),
    ],
)
def test_mixed_devices_are_found(mixed: Any) -> None:
    with PretendedCuda():
        there = torch.ones(3, device="cuda")
        with pytest.raises(MixedDevicesError, match="on cuda:0"):
            mixed(there)


@pytest.mark.parametrize(
    "fine",
    [
        lambda there: there * torch.tensor(2.0),
        lambda there: there[torch.tensor([1])],
        lambda there: there + torch.ones(3).to(there.device),
        lambda there: there + torch.ones(3).to(there),
        lambda there: torch.ones_like(there) + there.new_zeros(3),
        lambda there: torch.zeros(3, device=there.device).copy_(torch.ones(3)),
        lambda there: there[:2].view(1, 2).float().double(),
    ],
)
def test_what_a_gpu_takes_is_taken(fine: Any) -> None:
    with PretendedCuda():
        there = torch.ones(3, device="cuda")
        found = fine(there)
        assert pretended(found)
        assert found.device.type == "cuda"
        assert there.cpu().device.type == "cpu"
        assert not pretended(there.cpu() + torch.ones(3))
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()


def test_reads_are_counted() -> None:
    with PretendedCuda() as cuda:
        there = torch.ones(3, device="cuda")
        here = torch.ones(3)
        reads: list[Callable[[], object]] = [
            there.tolist,
            there[0].item,
            lambda: float(there.sum()),
            lambda: bool(there[0] > 0),
            there.cpu,
            lambda: there.to("cpu"),
            lambda: here.copy_(there),
            there.nonzero,
        ]
        for count, read in enumerate(reads, start=1):
            read()
            assert cuda.reads == count
        here.tolist(), there + 1, there.to(torch.float64)
        assert cuda.reads == 8


@pytest.mark.slow
def test_a_mixed_operation_in_the_decoding_loop_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keeping a path by indices that were left on the host."""
    from adaptspec.model.cache import TreeLayer

    own = TreeLayer.keep

    def keep(self: TreeLayer, base: int, rows: Any, count: int) -> None:
        own(self, base, torch.arange(base, base + count), count)

    with PretendedCuda() as cuda:
        model = on_gpu(cuda, "llama")
        assert model.shapes.kind == "graphs"
        monkeypatch.setattr(TreeLayer, "keep", keep)
        with pytest.raises(MixedDevicesError, match="index_select"):
            decoded("autoregressive", GREEDY, model, None)


@pytest.mark.slow
def test_a_forward_that_waits_for_the_device_is_not_captured() -> None:
    """The next rung is taken, and the reason kept."""
    with PretendedCuda() as cuda:
        module = cuda.put(tiny_module("llama"))
        own = module.model.norm.forward

        def forward(states: torch.Tensor) -> Any:
            assert float(states.sum()) < 1e9
            return own(states)

        module.model.norm.forward = forward
        model = LanguageModel(module)
        assert model.capability.level == "tree"
        assert model.shapes.kind == "fixed"
        assert "waits for the device" in model.shapes.reason
        run = decoded("prompt_lookup", GREEDY, model, None)
    assert run.token_ids == hf_greedy(
        LanguageModel(tiny_module("llama")), PROMPT, TOKENS
    )


@pytest.mark.slow
def test_what_python_decides_in_a_capture_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A number that is frozen in the graph: right where it was captured, and there
    alone."""
    own = step_inputs.StepInputs.masks

    def masks(self: Any, places: torch.Tensor, columns: int | None = None) -> Any:
        self._cached.fill_(int(self._words[3 * self.width]))
        return own(self, places, columns)

    monkeypatch.setattr(step_inputs.StepInputs, "masks", masks)
    with PretendedCuda() as cuda:
        model = on_gpu(cuda, "llama")
        assert model.capability.level == "tree"
        assert model.shapes.kind == "fixed"
        assert "graphs fail: logits differ" in model.shapes.reason


def test_a_transfer_from_the_host_is_no_part_of_a_graph() -> None:
    with PretendedCuda():
        graph: Any = torch.cuda.CUDAGraph()
        there = torch.zeros(2, device="cuda")
        with pytest.raises(CaptureError, match="memory of the host"):
            with torch.cuda.graph(graph):
                there.copy_(torch.ones(2))


def test_a_graph_is_run_again_over_the_same_tensors() -> None:
    with PretendedCuda() as cuda:
        given = torch.zeros(2, device="cuda")
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            doubled = (given.view(2, 1) * 2).view(2)
            given.add_(1)
        given.copy_(torch.tensor([3.0, 4.0]))
        graph.replay()
        assert doubled.tolist() == [6, 8]
        assert given.tolist() == [4, 5]
        assert (cuda.captures, cuda.replays) == (1, 1)


@pytest.mark.slow
def test_dynamic_and_fixed_shapes_can_be_asked_for() -> None:
    truth = hf_greedy(LanguageModel(tiny_module("llama")), PROMPT, TOKENS)
    for shapes in ("dynamic", "fixed"):
        with PretendedCuda() as cuda:
            module = cuda.put(tiny_module("llama"))
            model = LanguageModel(module, shapes=shapes)
            run = decoded("prompt_lookup", GREEDY, model, None)
            assert run.token_ids == truth
            assert model.shapes.kind == shapes
            assert cuda.captures == 0
