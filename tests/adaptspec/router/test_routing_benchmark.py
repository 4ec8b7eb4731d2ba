"""The benchmark of the router counts what is left behind, and tells if anything is."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from upstreams import Conversation, Received, World, skip_without_packages

skip_without_packages()

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
PROMPTS = [
    {"id": str(n), "class": ("sums", "code")[n % 2], "prompt": f"{text} {n}"}
    for n, text in enumerate(["Summarize this text", "def f(x): return"] * 4)
]


@pytest.fixture
def routing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("routing")
    yield found
    sys.modules.pop("routing", None)


def serves(busy: bool) -> Any:
    """A server that streams five pieces, and says how many requests it works at."""
    working = 0

    async def answer(request: Received, to: Conversation) -> None:
        nonlocal working
        if request.target == "/v1/models":
            await to.whole(b'{"object": "list", "data": [{"id": "tiny"}]}')
        elif request.target == "/slots":
            slots = [{"is_processing": True}] * (working + busy)
            await to.whole(json.dumps(slots).encode())
        else:
            working += 1
            try:
                await to.start("200 OK", "Content-Type: text/event-stream")
                for number in range(5):
                    piece = {"choices": [{"delta": {"content": str(number)}}]}
                    await to.piece(f"data: {json.dumps(piece)}\n\n".encode())
                    await asyncio.sleep(0.01)
                await to.piece(b"data: [DONE]\n\n")
                await to.end()
            finally:
                working -= 1

    return answer


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_what_is_left_is_told(
    world: World,
    tmp_path: Path,
    routing: Any,
    monkeypatch: pytest.MonkeyPatch,
    busy: bool,
) -> None:
    monkeypatch.setattr(routing, "SETTLE_SECONDS", 2.0 if busy else 30.0)
    workload = tmp_path / "w.jsonl"
    workload.write_text("\n".join(map(json.dumps, PROMPTS)))
    urls = [world.server(serves(busy and n == 0)).url for n in range(2)]
    options = [f"--workload={workload}", "--requests=20", "--pairs=4", "--tokens=5"]
    done = CliRunner().invoke(routing.main, [*urls, *options])
    assert done.exit_code == int(busy), done.output
    assert "left behind, open requests of the router: 0" in done.output
    assert "left behind, its connections to the servers: 0" in done.output
    left = int(busy)
    assert f"left behind, requests that the servers answer: {left}" in done.output
    assert "20 chats, 8 at a time" in done.output
    assert "router adds" in done.output
