"""A program that behaves as vLLM's server does, and an environment with it.

It knows the options that it is started with, counts as vLLM counts, and fails where a
test wants that. The tests' process imports :func:`install`; the rest runs as ``python``
of the environment.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

WORDS = ("one", " two", " three", " four", " five", " six", " seven", " eight")
IDS = tuple(range(101, 109))
# What it prints when it is asked for an answer, and ends.
LAST_WORDS = "RuntimeError: out of memory"


def install(folder: Path, packages: Mapping[str, str], **faults: Any) -> str:
    """An environment in ``folder`` with ``packages``; the path of its Python.

    Args:
        faults: ``unknown_option`` (one that it refuses), ``dies`` (when asked),
            ``core_fails`` (before it is ready), ``alone`` (it doesn't start beside
            another), ``core_ends`` (in the middle of an answer: the server says so, and
            with ``"dies"`` ends a moment later), ``no_ids`` (it tells no token ids),
            ``no_template``, ``hangs`` (at the end of an answer).
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = {"packages": dict(packages), **faults}
    program = folder / "python"
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from vllm_fake import main\n"
        f"main({told!r}, {str(folder)!r})\n"
    )
    program.chmod(0o755)
    return str(program)


def starts(folder: Path) -> list[dict[str, Any]]:
    """Arguments, some variables and the process of each server that was started."""
    lines = (folder / "starts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def main(told: Mapping[str, Any], folder: str) -> None:
    """As a Python: tell the packages, or be the server."""
    arguments = sys.argv[1:]
    if "-c" in arguments:
        print(json.dumps(told["packages"]))
        return
    names = ("PYTHONPATH", "HF_HUB_OFFLINE")
    others = starts(Path(folder)) if (Path(folder) / "starts.jsonl").exists() else []
    with (Path(folder) / "starts.jsonl").open("a") as file:
        kept = {
            k: v for k, v in os.environ.items() if k in names or k.startswith("VLLM")
        }
        started = {"arguments": arguments, "variables": kept, "pid": os.getpid()}
        file.write(json.dumps(started) + "\n")
    if (unknown := told.get("unknown_option")) in arguments:
        print(f"vllm: error: unrecognized arguments: {unknown}", file=sys.stderr)
        sys.exit(2)
    if told.get("alone") and any(psutil.pid_exists(other["pid"]) for other in others):
        print("MemoryError: no room beside another")
        sys.exit(1)
    if told.get("core_fails"):
        print("(EngineCore pid=7) ERROR 11-30 [core.py:9] ValueError: no cache blocks")
        frame = "(APIServer pid=5)   File somewhere, line 1, in a function\n"
        print(500 * frame + "(APIServer pid=5) RuntimeError: Engine core failed.")
        sys.exit(1)
    _serve(arguments, told)


def _serve(arguments: list[str], told: Mapping[str, Any]) -> None:
    from openai_fakes import FakeServer, running

    given = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    model = given.get("--model") or given["serve"]
    config = json.loads(given.get("--speculative-config", "{}"))
    drafted = int(config.get("num_speculative_tokens", 0))
    counted = {"generated": 0, "drafts": 0}

    def count(tokens: int, chunks: int) -> None:
        counted["generated"] += tokens
        counted["drafts"] += chunks - 1

    def tokenize(body: Mapping[str, Any]) -> dict[str, Any]:
        text = body["prompt"] if "prompt" in body else f"chat {body['messages']}"
        longest = int(given.get("--max-model-len", 2048))
        return {"tokens": [ord(c) for c in text][:20], "max_model_len": longest}

    def best(body: Mapping[str, Any]) -> dict[str, Any]:
        """Logits of ids: each 0.01 below the one before, but for odd ones."""
        wanted = body["logprob_token_ids"]
        logits = {f"token_id:{t}": 10 - 0.01 * t - 5 * (t % 2) for t in wanted}
        return {"choices": [{"text": "", "logprobs": {"top_logprobs": [logits]}}]}

    def metrics(body: Any) -> str:
        lines = [f'vllm:generation_tokens_total{{engine="0"}} {counted["generated"]}']
        if drafted:
            for name, value in (
                ("drafts", counted["drafts"]),
                ("draft_tokens", counted["drafts"] * drafted),
                ("accepted_tokens", counted["drafts"]),
            ):
                name = f"vllm:spec_decode_num_{name}_total"
                lines.append(f'{name}{{engine="0",model_name="a b"}} {value:.1f}')
        return "# HELP vllm:generation_tokens_total Of all.\n" + "\n".join(lines) + "\n"

    def read(body: Mapping[str, Any]) -> Any:
        if told.get("no_template") and "messages" in body:
            return 400, {"error": {"message": "there is no chat template"}}
        return tokenize(body)

    fake = FakeServer(
        words=WORDS,
        ids=None if told.get("no_ids") else IDS,
        steps=2 if drafted else 1,
        answered=count,
        pages={
            "/health": "ok",
            "/metrics": metrics,
            "/tokenize": read,
            "/v1/completions": best,
            "/v1/models": {"data": [{"id": model, "owned_by": "vllm"}]},
        },
    )
    if told.get("core_ends"):

        def end(tokens: int, chunks: int) -> None:
            print("ValueError: a bad kernel\nand much more", flush=True)
            if told["core_ends"] == "dies":
                threading.Timer(0.3, os._exit, [3]).start()

        fake.fails_after = 1
        fake.answered = end
    if told.get("hangs"):

        def hang(tokens: int, chunks: int) -> None:
            threading.Event().wait(60)

        fake.answered = hang
    if told.get("dies"):

        def die(tokens: int, chunks: int) -> None:
            print(LAST_WORDS, file=sys.stderr, flush=True)
            os._exit(3)

        fake.answered = die
    with running(fake, int(given["--port"])):
        threading.Event().wait()
