"""Whether vLLM reads the Medusa heads that AdaptSpec writes, and computes the same.

    python benchmarks/heads_vllm.py --vllm-python PYTHON [--model M --heads DIR]

Heads of every layout are written, or those in DIR taken, and loaded by vLLM's own
loader as its Medusa proposer loads them; no engine is started. The same states then go
through its heads and ours, in float32. PYTHON is that of an environment with vLLM; the
part of this file that runs there needs nothing of AdaptSpec.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from adaptspec.heads.medusa import MedusaHeads

STATES, FOUND = "states.safetensors", "found.safetensors"
DRAFT_POSITIONS = 6
HEADS, DRAFT_VOCAB = 3, 24  # of the heads made here
# A loader's option: without it every parameter must have come from the file.
UNTRACKED = {"enable_weights_track": False}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per layout: read and equal, or what vLLM says against it."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("-m", "--model", type=Path, help="the target of --heads")
    parser.add_argument("--heads", type=Path, help="a folder that train medusa wrote")
    given = parser.parse_args(arguments)
    if (given.model is None) != (given.heads is None):
        parser.error("--model and --heads belong together")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        target: Path = given.model
        made: dict[str, tuple[Path, MedusaHeads | None]] = {}
        if given.heads is None:
            target, layouts = write_layouts(work)
            made.update(layouts)
        else:
            made[given.heads.name] = given.heads, None
        for label, verdict in compare(given.vllm_python, target, made, work).items():
            print(f"{label}: {verdict}")


def write_layouts(work: Path) -> tuple[Path, dict[str, tuple[Path, MedusaHeads]]]:
    """A tiny target, and random heads of every kind that training makes."""
    import torch

    from adaptspec.heads.checkpoints import write_heads
    from adaptspec.heads.medusa import MedusaHeads, Output
    from adaptspec.testing.fakes import VOCAB, tiny_module, tiny_tokenizer

    target = work / "target"
    module = tiny_module("llama")
    module.save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)
    hidden = int(module.config.hidden_size)
    kept = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))
    reduced = sorted(kept[:DRAFT_VOCAB].tolist())
    kinds: dict[str, tuple[Output, int, list[int] | None]] = {
        "joint, reduced vocabulary": ("joint", 1, reduced),
        "joint, two blocks": ("joint", 2, None),
        "own": ("own", 1, None),
        "own, two blocks": ("own", 2, None),
        "own, reduced vocabulary": ("own", 1, reduced),
        "base": ("base", 1, None),
    }
    made = {}
    for number, (label, (output, layers, tokens)) in enumerate(kinds.items()):
        torch.manual_seed(number)
        size = VOCAB if tokens is None else len(tokens)
        heads = MedusaHeads(hidden, size, HEADS, layers, output, tokens)
        for parameter in heads.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folder = work / f"heads-{number}"
        write_heads(
            folder,
            heads.eval(),
            base_model="target",
            vocab_size=VOCAB,
            paths=(((0,), 0.5), ((0, 0), 0.2)),
            ranks=None,
            record={},
        )
        made[label] = folder, heads
    return target, made


def compare(
    python: str,
    target: Path,
    made: Mapping[str, tuple[Path, MedusaHeads | None]],
    work: Path,
) -> dict[str, str]:
    """Label -> what became of it in vLLM."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    from adaptspec.heads.checkpoints import read_heads

    config = AutoConfig.from_pretrained(target)
    torch.manual_seed(0)
    states = torch.randn(DRAFT_POSITIONS, config.hidden_size)
    save_file({"states": states}, work / STATES)
    folders = {label: str(folder) for label, (folder, _) in made.items()}
    child = subprocess.run(
        [python, __file__, "--child", str(target), str(work), json.dumps(folders)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    told: dict[str, str] = json.loads(child.stdout.splitlines()[-1])
    found = load_file(work / FOUND)
    verdicts = {}
    for label, (folder, heads) in made.items():
        if label not in found:
            verdicts[label] = f"refused: {told[label]}"
            continue
        ours = heads or read_heads(folder, states.shape[1], config.vocab_size).heads
        expected = spread(ours, states, config.vocab_size, target)
        theirs = found[label]
        known = expected.isfinite()
        if not torch.equal(known, theirs.isfinite()):
            verdicts[label] = "read, but guesses other tokens"
            continue
        off = float((expected[known] - theirs[known]).abs().max())
        same = float((expected.argmax(-1) == theirs.argmax(-1)).float().mean())
        verdicts[label] = (
            f"{told[label]}; logits differ by at most {off:.1e}, likeliest tokens "
            f"agree in {same:.0%}"
        )
    return verdicts


def spread(
    heads: MedusaHeads, states: torch.Tensor, vocab: int, target: Path
) -> torch.Tensor:
    """Our logits ``[heads, positions, vocab]``, -inf for what heads don't know."""
    import torch
    from transformers import AutoModelForCausalLM

    lm_head = None
    if heads.output == "base":
        model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        lm_head = model.get_output_embeddings()
    with torch.no_grad():
        logits: torch.Tensor = heads.float()(states, lm_head)
    if heads.token_map is None:
        return logits
    whole = logits.new_full((*logits.shape[:-1], vocab), float("-inf"))
    whole[..., heads.token_map] = logits
    return whole


def child(target: str, work: str, folders: str) -> None:
    """Under vLLM's Python: load each folder, run the states, tell what happened."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    # vLLM prints to stdout; the answer must be alone there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    from safetensors.torch import load_file, save_file

    states = load_file(Path(work) / STATES)["states"]
    told: dict[str, str] = {}
    found = {}
    for label, folder in json.loads(folders).items():
        problem = ""
        for extra in ({}, UNTRACKED):
            try:
                outcome = _run(target, folder, states, Path(work), extra)
            except Exception as error:  # whatever its loader has against the file
                lines = str(error).strip().splitlines() or [""]
                problem = problem or f"{type(error).__name__} {lines[0]}".strip()
                told[label] = problem
                continue
            found[label] = outcome.contiguous()
            told[label] = "read"
            if extra:
                told[label] += f" with {json.dumps(extra)} only ({problem})"
            break
    save_file(found or {"none": torch.zeros(1)}, Path(work) / FOUND)
    print(json.dumps(told), file=answers, flush=True)


def _run(
    target: str, folder: str, states: Any, work: Path, extra: Mapping[str, Any]
) -> Any:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        model_parallel_is_initialized,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.model_loader import get_model
    from vllm.platforms import current_platform

    if current_platform.is_cpu():  # as its CPU worker does before it loads anything
        from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

        _set_torch_accelerator_to_noop()
    counts = json.loads((Path(folder) / "config.json").read_text())
    config = EngineArgs(
        model=target,
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        model_loader_extra_config=dict(extra),
        speculative_config={
            "method": "medusa",
            "model": folder,
            "num_speculative_tokens": counts["medusa_num_heads"],
        },
    ).create_engine_config()
    with set_current_vllm_config(config), torch.inference_mode():
        if not model_parallel_is_initialized():
            meeting = f"file://{work / 'meeting'}"
            init_distributed_environment(1, 0, meeting, 0, "gloo")
            initialize_model_parallel(1, 1)
        draft = config.speculative_config.draft_model_config
        heads = get_model(vllm_config=config, model_config=draft)
        with set_forward_context(None, config):
            return torch.stack(heads.compute_logits(heads(states))).float()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5])
    else:
        main()
