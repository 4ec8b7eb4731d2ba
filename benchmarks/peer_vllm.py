"""vLLM's CPU build as a contender: run by its own Python, one JSON line per prompt.

The benchmark starts this file with ``--vllm-python``; it needs nothing of AdaptSpec.
Decoding time is what the whole output takes less what one token takes on the same
prompt, both with prefix caching off.
"""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def serve(model: str, draft: str, method: str, max_length: str = "2048") -> None:
    """Answer ``{"ids": [...], "length": n}`` lines until the input ends."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{cores - 1}")
    # vLLM prints to stdout; the answers must be alone there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    speculative: dict[str, Any] | None = None
    if method == "ngram":
        speculative = {
            "method": "ngram",
            "num_speculative_tokens": 8,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    elif method == "draft_model":
        speculative = {
            "method": "draft_model",
            "model": draft,
            "num_speculative_tokens": 4,
        }
    engine = LLM(
        model,
        dtype="bfloat16",
        max_model_len=int(max_length),
        max_num_seqs=1,
        enable_prefix_caching=False,
        speculative_config=speculative,
    )

    def run(ids: list[int], length: int) -> tuple[list[int], float]:
        controls = SamplingParams(temperature=0.0, max_tokens=length)
        started = perf_counter()
        (done,) = engine.generate([{"prompt_token_ids": ids}], controls, use_tqdm=False)
        return list(done.outputs[0].token_ids), perf_counter() - started

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        _, first = run(asked["ids"], 1)
        tokens, whole = run(asked["ids"], asked["length"])
        steps = max(1, len(tokens) - 1)
        answer = {"tokens": tokens, "ms_per_token": 1e3 * (whole - first) / steps}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:5])
