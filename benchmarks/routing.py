"""What the router costs, and what it leaves behind when clients leave.

    python benchmarks/routing.py http://127.0.0.1:8001 http://127.0.0.1:8002

Two servers of one model must run; the router is started before them with a classifier
learnt from the workload, whose classes go to the one and the other in turn. Then

* requests that generate nothing (`/v1/models`), and chats of the workload, streamed,
  are sent directly and through the router, each right after the other and first in
  turn; the table has the median of what the router adds to each, and the quartiles;
* chats are sent from several threads at a time; half of the clients leave after some
  pieces, before the first one, say. When all are done it is counted what is left: open
  requests of the router, its connections to the servers, requests that the servers
  still answer (by llama.cpp's `/slots`, vLLM's `/metrics`), files and memory;
* where `openai` is installed, its client streams a chat through, and the text is
  compared with the server's own.

It ends with 1 where something is left, or a text differs.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import click
import httpx2
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from adaptspec.router.table import table_text
from adaptspec.workloads import Prompt, Workload, example_workload, read_workload
from adaptspec_tuner.classes.learn import learn

SETTLE_SECONDS = 30.0
Pair = tuple[float, float]


@click.command()
@click.argument("urls", nargs=2)
@click.option("--workload", type=click.Path(path_type=Path))
@click.option("--requests", default=200, help="With disconnects.")
@click.option("--at-once", default=8, help="Of them.")
@click.option(
    "--pairs", default=20, help="Chats asked directly and through the router."
)
@click.option("--tokens", default=32, help="Of an answer.")
@click.option("--seed", default=0)
def main(
    urls: tuple[str, str],
    workload: Path | None,
    requests: int,
    at_once: int,
    pairs: int,
    tokens: int,
    seed: int,
) -> None:
    """Measure the router before two servers."""
    prompts = example_workload() if workload is None else read_workload(workload)
    model = models_of(urls[0])
    console = Console()
    table = table_of(urls, prompts)
    with router_before(table) as (router, process):
        servers = table["servers"]
        console.print(overhead_table(servers, router, model, prompts, pairs, tokens))
        chats = [chat(p, model, tokens) for p in prompts.prompts]
        client_says = openai_streams(urls, router, chats[0])
        # The first requests load what later ones find loaded.
        storm(router, chats, max(1, requests // 10), at_once, seed + 1)
        left(urls, router, process)
        before = resources(process)
        sent = storm(router, chats, requests, at_once, seed)
        remains = left(urls, router, process)
        after = resources(process)
    console.print(client_says)
    told = ", ".join(f"{count} {what}" for what, count in sent.items())
    console.print(f"{requests} chats, {at_once} at a time: {told}")
    for what, count in remains.items():
        console.print(f"left behind, {what}: {count}")
    for what, count in after.items():
        console.print(f"router's {what}: {before[what]} before, {count} after")
    same = "DIFFERS" not in client_says
    sys.exit(0 if same and not any(remains.values()) else 1)


def table_of(urls: Sequence[str], workload: Workload) -> dict[str, Any]:
    """Classes by turns to the one and the other server."""
    classifier = learn(workload.prompts)
    return {
        "servers": {"one": urls[0], "other": urls[1]},
        "classes": {
            name: ("one", "other")[number % 2]
            for number, name in enumerate(workload.classes)
        },
        "default": "one",
        "classifier": None if classifier is None else classifier.as_json(),
    }


@contextmanager
def router_before(table: Mapping[str, Any]) -> Iterator[tuple[str, psutil.Process]]:
    """The router as a program of its own: its URL and its process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        path.write_text(table_text(table, path))
        words = [sys.executable, "-m", "adaptspec", "route", str(path), "--port", "0"]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            said = process.stderr.readline()
            if (found := re.match(r"(http://\S+?): ", said)) is None:
                raise click.ClickException(said + process.stderr.read())
            drain = threading.Thread(target=process.stderr.read)
            drain.start()
            try:
                yield found[1], psutil.Process(process.pid)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(60)
                drain.join()


def models_of(url: str) -> str:
    """The name of the model that a server serves."""
    try:
        listed = httpx2.get(f"{url}/v1/models", trust_env=False).json()
        return str(listed["data"][0]["id"])
    except (httpx2.HTTPError, LookupError, TypeError, ValueError) as error:
        raise click.ClickException(f"{url} lists no model: {error!r}") from None


def chat(prompt: Prompt, model: str, tokens: int) -> dict[str, Any]:
    """A request that streams a greedy answer."""
    content = prompt.content
    if isinstance(content, str):
        content = [{"role": "user", "content": content}]
    asked = prompt.max_new_tokens or tokens
    return {
        "model": model,
        "messages": content,
        "max_tokens": min(asked, tokens),
        "temperature": 0,
        "stream": True,
    }


def timed(client: httpx2.Client, url: str, body: Any) -> tuple[float, float]:
    """Milliseconds to the first byte of an answer, and to its last."""
    started = time.perf_counter()
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        first = None
        for _ in answer.iter_raw():
            first = first or time.perf_counter()
    ended = time.perf_counter()
    return 1e3 * ((first or ended) - started), 1e3 * (ended - started)


def chosen(client: httpx2.Client, router: str, body: Any) -> str:
    """The name of the server that the router asks."""
    answer = client.post(f"{router}/v1/chat/completions", json=body)
    answer.raise_for_status()
    return str(answer.headers["x-adaptspec-server"])


def overhead_table(
    servers: Mapping[str, str],
    router: str,
    model: str,
    workload: Workload,
    pairs: int,
    tokens: int,
) -> Table:
    """What the router adds, in milliseconds."""
    direct = next(iter(servers.values()))
    table = Table("request", "of it", "directly", "router adds", "quartiles", "pairs")
    # Some servers close a connection after an answer without saying so.
    limits = httpx2.Limits(max_keepalive_connections=0)
    with httpx2.Client(timeout=None, trust_env=False, limits=limits) as client:

        def listing(url: str) -> tuple[float, float]:
            started = time.perf_counter()
            client.get(f"{url}/v1/models").raise_for_status()
            took = 1e3 * (time.perf_counter() - started)
            return took, took

        rows = compared(listing, direct, router, 10 * pairs)
        _add(table, "models", "whole", [row[1] for row in rows])
        found: list[tuple[Pair, Pair]] = []
        for prompt in workload.limit(pairs).prompts:
            body = chat(prompt, model, tokens)

            def ask(url: str, body: Any = body) -> tuple[float, float]:
                return timed(client, url, body)

            # Directly the server is asked that the router chose, and both find the
            # prompt read, where the server keeps it.
            server = chosen(client, router, body)
            found += compared(ask, servers[server], router, 1, len(found))
        _add(table, "chat", "to the first byte", [row[0] for row in found])
        _add(table, "chat", "whole", [row[1] for row in found])
    return table


def compared(
    ask: Callable[[str], Pair], direct: str, router: str, count: int, turn: int = 0
) -> list[tuple[Pair, Pair]]:
    """Of each pair (directly, through the router) to the first byte, and whole."""
    rows = []
    for number in range(turn, turn + count):
        order = [direct, router] if number % 2 == 0 else [router, direct]
        took = {url: ask(url) for url in order}
        one, other = took[direct], took[router]
        rows.append(((one[0], other[0]), (one[1], other[1])))
    return rows


def _add(table: Table, name: str, part: str, pairs: Sequence[Pair]) -> None:
    added = [through - direct for direct, through in pairs]
    low, middle, high = quantiles(added, n=4)
    direct = quantiles([pair[0] for pair in pairs], n=4)[1]
    table.add_row(
        name,
        part,
        f"{direct:.2f} ms",
        f"{middle:.2f} ms",
        f"{low:.2f} to {high:.2f}",
        str(len(pairs)),
    )


def storm(
    router: str, chats: Sequence[Any], count: int, at_once: int, seed: int
) -> dict[str, int]:
    """How many chats came to their end, and how many were left."""
    chance = random.Random(seed)
    read = [None, None, 0, 1, 2, 5]  # pieces after which the client leaves
    plans = [(chance.choice(chats), chance.choice(read)) for _ in range(count)]
    sent = {"whole": 0, "left": 0, "refused": 0}
    lock = threading.Lock()

    def one(plan: tuple[Any, int | None]) -> None:
        body, pieces = plan
        # A client of its own, whose connection closes when it leaves.
        with httpx2.Client(timeout=None, trust_env=False) as client:
            if pieces == 0:
                told = _leave_at_once(client, router, body)
            else:
                told = _read(client, router, body, pieces)
        with lock:
            sent[told] += 1

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, plans))
    return sent


def _read(client: httpx2.Client, url: str, body: Any, pieces: int | None) -> str:
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            return "refused"
        for number, _ in enumerate(answer.iter_raw(), start=1):
            if number == pieces:
                return "left"
    return "whole"


def _leave_at_once(client: httpx2.Client, url: str, body: Any) -> str:
    """Leave while the server still reads the prompt, about."""
    try:
        address = f"{url}/v1/chat/completions"
        with client.stream("POST", address, json=body, timeout=0.02):
            return "left"
    except httpx2.TimeoutException:
        return "left"


def left(urls: Sequence[str], router: str, process: psutil.Process) -> dict[str, int]:
    """What is still open, once it has had time to end."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        found = {
            "open requests of the router": open_requests(router),
            "its connections to the servers": connections(process, urls),
            "requests that the servers answer": sum(map(busy, urls)),
        }
        if not any(found.values()) or time.monotonic() > until:
            return found
        time.sleep(0.2)


def open_requests(router: str) -> int:
    """As the router counts them."""
    page = httpx2.get(f"{router}/metrics", trust_env=False).text
    return _number(page, "adaptspec_router_open_requests")


def connections(process: psutil.Process, urls: Sequence[str]) -> int:
    """Those to the servers' ports."""
    ports = {httpx2.URL(url).port for url in urls}
    return sum(
        bool(c.raddr) and c.raddr.port in ports and c.status != psutil.CONN_TIME_WAIT
        for c in process.net_connections("tcp")
    )


def busy(url: str) -> int:
    """Requests that a server works at; 0 where it doesn't tell."""
    with httpx2.Client(trust_env=False) as client:
        slots = client.get(f"{url}/slots")
        if slots.status_code == 200:
            return sum(bool(slot.get("is_processing")) for slot in slots.json())
        page = client.get(f"{url}/metrics").text
    return _number(page, "vllm:num_requests_running")


def _number(page: str, name: str) -> int:
    pattern = rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$"
    return sum(int(float(value)) for value in re.findall(pattern, page, re.MULTILINE))


def resources(process: psutil.Process) -> dict[str, int]:
    """Files and memory of a process."""
    return {
        "open files": process.num_fds(),
        "threads": process.num_threads(),
        "memory in MiB": process.memory_info().rss >> 20,
    }


def openai_streams(urls: Sequence[str], router: str, body: Mapping[str, Any]) -> str:
    """Whether OpenAI's client gets the server's text through the router."""
    try:
        import openai
    except ImportError:
        return "OpenAI's client isn't installed, so it wasn't asked"
    texts = []
    for url in (urls[0], router):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = client.chat.completions.create(**json.loads(json.dumps(body)))
            pieces = [
                part.choices[0].delta.content or "" for part in stream if part.choices
            ]
            texts.append(pieces)
    direct, through = ("".join(pieces) for pieces in texts)
    told = "the server's own text" if direct == through else "a text that DIFFERS"
    return f"OpenAI's client streamed {told} in {len(texts[1])} pieces"


if __name__ == "__main__":
    main()
