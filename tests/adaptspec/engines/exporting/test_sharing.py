"""What several servers on one machine are started with, and what is said of it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from adaptspec.engines.exporting.compose import compose_text
from adaptspec.engines.exporting.measured import choices_of, found_here
from adaptspec.engines.exporting.plan import Plan, by_class
from adaptspec.engines.exporting.sharing import shared
from adaptspec.engines.exporting.texts import as_flags, as_json
from adaptspec.engines.inference_engine import Launch
from adaptspec_profiles.memory import MemoryStore
from measured_engines import HERE, keep_run

CLASSES = "abc"
SHARE = "--gpu-memory-utilization"


def split(engine: str, device: str, count: int, *arguments: str) -> Plan:
    """As many servers as there are classes, each with a setting of its own."""
    environment = replace(HERE, engine=engine, device=device)
    store = MemoryStore()
    measured = {
        name: (1.0, {("ngram", number): 2.0})
        for number, name in enumerate(CLASSES[:count], start=1)
    }
    keep_run(store, measured, environment=environment)
    found = found_here(store, choices_of(store, engine, None), environment)
    plan = by_class(found, {}, lambda setting: Launch(["serve", *arguments]), 8001)
    return shared(plan, engine)


def shares(plan: Plan) -> list[float]:
    commands: Sequence[Sequence[str]] = [s.launch.command for s in plan.servers]
    return [float(c[c.index(SHARE) + 1]) for c in commands if SHARE in c]


@pytest.mark.parametrize("count", [2, 3])
def test_servers_of_vllm_share_a_gpu_and_start_one_after_the_other(count: int) -> None:
    plan = split("vllm", "cuda", count)
    found = shares(plan)
    assert len(found) == len(plan.servers) > 1
    assert 0.8 < sum(found) <= 0.92
    assert any("when the one before it is ready" in note for note in plan.notes)


LATE_SERVER = """
import http.server, sys, time

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

time.sleep(0.5)
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Health)
print("ready", flush=True)
server.handle_request()
"""


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_printed_lines_start_each_server_when_the_one_before_it_is_ready(
    device: str, tmp_path: Path
) -> None:
    program = tmp_path / "serve.py"
    program.write_text(LATE_SERVER)
    plan = split("vllm", device, 2)
    first, second = plan.servers[:2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = Launch([sys.executable, str(program)])
    then = Launch(["echo", "second"])
    servers = [replace(first, launch=serve, port=port), replace(second, launch=then)]
    text = as_flags(
        replace(plan, servers=servers), "vllm", "127.0.0.1", background=True
    )
    done = subprocess.run(
        ["sh", "-c", f"{text}\nwait"], capture_output=True, text=True, timeout=60
    )
    order = [line.split()[0] for line in done.stdout.splitlines()]
    assert order == ["ready", "second"], done.stderr
    # One that ends isn't waited for.
    servers[0] = replace(servers[0], launch=Launch(["false"]))
    text = as_flags(
        replace(plan, servers=servers), "vllm", "127.0.0.1", background=True
    )
    ended = subprocess.run(
        ["sh", "-c", f"{text}\nwait"], capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.startswith("second")


def test_a_printed_line_finds_the_engines_own_programs_first(tmp_path: Path) -> None:
    folder = tmp_path / "an environment" / "bin"
    folder.mkdir(parents=True)
    tool = folder / "ninja"
    tool.write_text("#!/bin/sh\necho its own\n")
    tool.chmod(0o755)
    plan = split("vllm", "cuda", 1)
    launch = Launch(["sh", "-c", "ninja"], path=[str(folder)])
    plan = replace(plan, servers=[replace(plan.servers[0], launch=launch)])
    (told,) = as_json(plan, "vllm", "127.0.0.1")["servers"]
    assert told["path"] == [str(folder)]
    done = subprocess.run(
        ["sh", "-c", told["shell"]], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "its own\n", done.stderr
    # A container has none of this machine's folders.
    assert str(folder) not in compose_text(plan, "vllm", "127.0.0.1", None, [])


def test_a_compose_file_starts_each_when_the_one_before_it_is_ready() -> None:
    plan = split("vllm", "cuda", 3)
    text = compose_text(plan, "vllm", "127.0.0.1", None, ["org/model"])
    services = yaml.safe_load(text)["services"]
    names = [server.name for server in plan.servers]
    assert [list(services[name].get("depends_on", {})) for name in names] == [
        [],
        *([name] for name in names[:-1]),
    ]
    for server in plan.servers[:-1]:
        after = services[names[names.index(server.name) + 1]]["depends_on"]
        assert after[server.name] == {"condition": "service_healthy"}
        test = services[server.name]["healthcheck"]["test"]
        assert f"http://127.0.0.1:{server.port}/health" in test[-1]
        compile(test[-1], "healthcheck", "exec")
    told = [s["start_when_ready"] for s in as_json(plan, "vllm", "::1")["servers"]]
    assert told == [None, *names[:-1]]


@pytest.mark.parametrize(
    ("engine", "device"), [("llama.cpp", "cpu"), ("sglang", "cuda")]
)
def test_servers_that_measure_no_free_memory_start_at_once(
    engine: str, device: str
) -> None:
    plan = split(engine, device, 2)
    assert "while" not in as_flags(plan, engine, "127.0.0.1", background=True)
    assert "depends_on" not in compose_text(plan, engine, "::1", "image", [])


def test_one_server_has_the_gpu_alone() -> None:
    plan = split("vllm", "cuda", 1)
    assert (shares(plan), plan.notes) == ([], [])


@pytest.mark.parametrize(
    "told", [[SHARE, "0.4"], [f"{SHARE}=0.4"], ["--gpu_memory_utilization", "0.4"]]
)
def test_a_share_that_the_tune_was_told_stays(told: list[str]) -> None:
    plan = split("vllm", "cuda", 2, *told)
    assert all(list(s.launch.command) == ["serve", *told] for s in plan.servers)
    assert any("needs a GPU of its own" in note for note in plan.notes)


def test_servers_of_sglang_need_a_gpu_each() -> None:
    found = split("vllm", "cuda", 2)
    plan = shared(replace(found, notes=[]), "sglang")
    assert any("needs a GPU of its own" in note for note in plan.notes)


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_on_a_cpu_they_share_its_cores_and_nothing_is_added(engine: str) -> None:
    plan = split(engine, "cpu", 2)
    assert shares(plan) == []
    assert any("all 2 threads" in note for note in plan.notes)


def test_llama_cpp_takes_what_it_needs_of_a_gpu() -> None:
    """And says nothing where that is less than all layers."""
    plan = split("llama.cpp", "cuda", 2)
    assert shares(plan) == []
    alone, fits = plan.notes
    assert "share it when both are busy" in alone
    assert "leaves layers off it without an error (--fit)" in fits
    assert plan.before(plan.servers[1]) is plan.servers[0]
    text = compose_text(plan, "llama.cpp", "127.0.0.1", None, [])
    first, second, *_ = yaml.safe_load(text)["services"].values()
    assert list(second["depends_on"].values()) == [{"condition": "service_healthy"}]
    assert first["healthcheck"]["test"][1] == "curl"
