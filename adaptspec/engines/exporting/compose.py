"""A plan as a docker compose file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptspec.engines.exporting.plan import Plan, Server
from adaptspec.engines.exporting.texts import HEALTH, heading, sentences
from adaptspec.errors import EngineError


@dataclass(frozen=True)
class Image:
    """A container image that holds an engine.

    Args:
        name: Its name; empty: none is published for the device.
        program: What starts the engine in it.
    """

    name: str
    program: Sequence[str]


# By engine and whether it runs on a GPU.
IMAGES = {
    ("llama.cpp", False): Image(
        "ghcr.io/ggml-org/llama.cpp:server", ["/app/llama-server"]
    ),
    ("llama.cpp", True): Image(
        "ghcr.io/ggml-org/llama.cpp:server-cuda", ["/app/llama-server"]
    ),
    ("vllm", False): Image("", ["vllm", "serve"]),
    ("vllm", True): Image("vllm/vllm-openai:{version}", ["vllm", "serve"]),
    ("sglang", False): Image("", ["python3", "-m", "sglang.launch_server"]),
    ("sglang", True): Image(
        "lmsysorg/sglang:latest", ["python3", "-m", "sglang.launch_server"]
    ),
}
INSIDE = "0.0.0.0"  # what a container's program listens on
HUB = "/root/.cache/huggingface/hub"  # where containers look for models of the hub
PART = re.compile(r"-\d{5}(-of-\d{5}\.gguf)$")  # of a model file that is divided


def compose_text(
    plan: Plan, engine: str, host: str, image: str | None, files: Sequence[str]
) -> str:
    """A compose file with a service for each server; ports are open on ``host``.

    Args:
        image: Of the engine; None: the one that its makers publish.
        files: Models' files and folders, which are mounted at the same paths.

    Raises:
        EngineError: if no image is known.
    """
    import yaml

    gpu = plan.found.environment.device == "cuda"
    chosen = IMAGES.get((engine, gpu), Image("", []))
    version = plan.found.environment.versions.get(engine, "")
    name = image or chosen.name.format(version=f"v{version}" if version else "latest")
    if not name:
        raise EngineError(
            f"no image of {engine} is known for {plan.found.environment.device}; name "
            "one with --image"
        )
    volumes = [_literal(f"{path}:{path}:ro") for path in _mounted(files)]
    if any(not Path(name).exists() for name in files) and engine != "llama.cpp":
        from huggingface_hub.constants import HF_HUB_CACHE

        volumes.append(_literal(f"{Path(HF_HUB_CACHE).absolute()}:{HUB}"))
    services = {
        server.name: _service(server, name, chosen.program, volumes, host, gpu)
        for server in plan.servers
    }
    for server in plan.servers:
        if (first := plan.before(server)) is not None:
            services[first.name]["healthcheck"] = _health(first)
            services[server.name]["depends_on"] = {
                first.name: {"condition": "service_healthy"}
            }
    lines = [f"# {line}" for line in heading(plan, engine)]
    for server in plan.servers:
        lines += ["#", *(f"# {line}" for line in sentences(server, plan))]
    dumped = yaml.safe_dump(
        {"services": services}, sort_keys=False, allow_unicode=True, width=1000
    )
    return "\n".join(lines) + "\n" + str(dumped)


def _service(
    server: Server,
    image: str,
    program: Sequence[str],
    volumes: Sequence[str],
    host: str,
    gpu: bool,
) -> dict[str, Any]:
    arguments = _arguments(server.launch.command)
    inside = ["--host", INSIDE, "--port", str(server.port)]
    service: dict[str, Any] = {
        "image": image,
        "entrypoint": list(program),
        "command": [_literal(word) for word in [*arguments, *inside]],
        "ports": [f"{host}:{server.port}:{server.port}"],
        "restart": "unless-stopped",
    }
    if server.launch.environment:
        service["environment"] = {
            name: _literal(value) for name, value in server.launch.environment.items()
        }
    if volumes:
        service["volumes"] = list(volumes)
    if gpu:
        device = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
        service["ipc"] = "host"
    return service


def _health(server: Server) -> dict[str, Any]:
    """Asked by Python, which is in the image of every engine that needs it."""
    url = f"http://127.0.0.1:{server.port}{HEALTH}"
    asked = f"import urllib.request as r; r.urlopen({url!r}, timeout=5)"
    return {
        "test": ["CMD", "python3", "-c", asked],
        "interval": "5s",
        "timeout": "10s",
        "retries": 3,
        # Weights may be read from a slow disk, and compiled for the first time.
        "start_period": "20m",
    }


def _arguments(command: Sequence[str]) -> list[str]:
    """A command without its program: ``llama-server``, ``vllm serve``, or a module.

    vLLM's module takes the model behind an option, ``vllm serve`` takes it alone.
    """
    is_module = Path(command[0]).name.startswith("python") and command[1:2] == ["-m"]
    words = list(command[3 if is_module else 1 :])
    if words[:1] == ["serve"]:
        return words[1:]
    return words[1:] if words[:1] == ["--model"] else words


def _literal(word: str) -> str:
    """Compose puts variables in place of names behind a single dollar sign."""
    return word.replace("$", "$$")


def _mounted(files: Sequence[str]) -> list[Path]:
    """Files and folders that are here, and where links in them lead."""
    found: dict[Path, None] = {}
    for name in files:
        path = Path(name).absolute()
        if not path.exists():
            continue  # a hub name
        inside = sorted(path.iterdir()) if path.is_dir() else _parts(path)
        found.update(dict.fromkeys([path] if path.is_dir() else inside))
        for one in inside:
            if (real := one.resolve()) != one and real.exists():
                found[real if path.is_file() else real.parent] = None
    return [p for p in found if not any(o in p.parents for o in found)]


def _parts(path: Path) -> list[Path]:
    """A model file with the others that it is divided into."""
    if (part := PART.search(path.name)) is None:
        return [path]
    stem = path.name[: part.start()]
    named = re.compile(re.escape(stem) + r"-\d{5}" + re.escape(part[1]))
    return sorted(one for one in path.parent.iterdir() if named.fullmatch(one.name))
