"""flashspec as a contender: run by a Python that has it, one JSON line per prompt.

The benchmark starts this file with ``--flashspec-python``; it needs nothing of
AdaptSpec. Decoding time is what the whole output takes less what one token takes on the
same prompt.
"""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter


def serve(model: str, draft: str) -> None:
    """Answer ``{"ids": [...], "length": n}`` lines until the input ends."""
    # What it logs must not stand among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    from flashspec import FlashSpecConfig, SamplingConfig, SpeculativeEngine
    from flashspec.engine import HuggingFaceDrafter, TargetModel
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(path: str) -> torch.nn.Module:
        loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16
        )
        return loaded.to(device)

    target = TargetModel(model, device, torch.bfloat16, model=load(model))
    drafter = HuggingFaceDrafter(draft, device, torch.bfloat16, model=load(draft))
    config = FlashSpecConfig(
        device=str(device), sampling=SamplingConfig(temperature=0.0)
    )
    engine = SpeculativeEngine(config, [drafter], target)

    def run(ids: list[int], length: int) -> tuple[list[int], float]:
        prompt = torch.tensor([ids], device=device)
        started = perf_counter()
        done = engine.generate(prompt, max_new_tokens=length)
        seconds = perf_counter() - started
        return done.output_ids[0, : done.n_tokens_generated].tolist(), seconds

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        _, first = run(asked["ids"], 1)
        tokens, whole = run(asked["ids"], asked["length"])
        steps = max(1, len(tokens) - 1)
        answer = {"tokens": tokens, "ms_per_token": 1e3 * (whole - first) / steps}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:3])
