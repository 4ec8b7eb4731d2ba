"""A plan as a docker compose file."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptspec.engines.exporting.plan import Plan, Server
from adaptspec.engines.exporting.texts import HEALTH, heading, sentences
from adaptspec.errors import EngineError

# What starts an engine in its image.
PROGRAMS = {
    "llama.cpp": ["/app/llama-server"],
    "vllm": ["vllm", "serve"],
    "sglang": ["python3", "-m", "sglang.launch_server"],
}
# By engine and device, of those that are published.
IMAGES = {
    ("llama.cpp", "cpu"): "ghcr.io/ggml-org/llama.cpp:server",
    ("llama.cpp", "cuda"): "ghcr.io/ggml-org/llama.cpp:server-cuda",
    ("llama.cpp", "rocm"): "ghcr.io/ggml-org/llama.cpp:server-rocm",
    ("llama.cpp", "vulkan"): "ghcr.io/ggml-org/llama.cpp:server-vulkan",
    ("vllm", "cuda"): "vllm/vllm-openai:{tag}",
    ("sglang", "cuda"): "lmsysorg/sglang:latest",
}
# What a container is given of other makers' devices.
DEVICES = {"rocm": ["/dev/kfd", "/dev/dri"], "vulkan": ["/dev/dri"]}
RELEASE = re.compile(r"\d+(\.\d+)*(\.post\d+)?")
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

    device = plan.found.environment.device
    measured = plan.found.environment.versions.get(engine, "")
    published, note = _published(engine, device, measured)
    if not (name := image or published):
        raise EngineError(
            f"no image of {engine} is known for {device}; name one with --image"
        )
    told = {w: None for s in plan.servers for w in _arguments(s.launch.command)}
    named = [path for word in told for path in _paths(word)]
    whole = [path for path in named if os.path.isabs(path)]
    volumes = [_literal(f"{path}:{path}:ro") for path in _mounted([*files, *whole])]
    if any(not Path(name).exists() for name in files) and engine != "llama.cpp":
        from huggingface_hub.constants import HF_HUB_CACHE

        volumes.append(_literal(f"{Path(HF_HUB_CACHE).absolute()}:{HUB}"))
    services = {
        server.name: _service(
            server, name, PROGRAMS.get(engine, []), volumes, host, device
        )
        for server in plan.servers
    }
    lines = [f"# {line}" for line in heading(plan, engine)]
    if image is None and note:
        lines.append(f"# {note}")
    if relative := [path for path in named if not os.path.isabs(path)]:
        lines.append(
            f"# {', '.join(relative)}: a container has no such path; tune with the "
            "whole path, so that it is mounted"
        )
    if engine == "llama.cpp":
        # Its images check themselves, but always by port 8080.
        for server in plan.servers:
            services[server.name]["healthcheck"] = _health(server, engine)
    for server in plan.servers:
        if (first := plan.before(server)) is not None:
            services[first.name]["healthcheck"] = _health(first, engine)
            services[server.name]["depends_on"] = {
                first.name: {"condition": "service_healthy"}
            }
    for server in plan.servers:
        lines += ["#", *(f"# {line}" for line in sentences(server, plan))]
    dumped = yaml.safe_dump(
        {"services": services}, sort_keys=False, allow_unicode=True, width=1000
    )
    return "\n".join(lines) + "\n" + str(dumped)


def _published(engine: str, device: str, measured: str) -> tuple[str, str]:
    """The image that an engine's makers publish, and how it isn't what was measured.

    Args:
        measured: The engine's version; empty: none was measured.
    """
    release = measured.partition("+")[0]  # no tag has a "+"
    tag = f"v{release}" if RELEASE.fullmatch(release) else "latest"
    name = IMAGES.get((engine, device), "").format(tag=tag)
    if not measured or name.endswith(f":v{measured}"):
        return name, ""
    return name, (
        f"the image {name} isn't the build that was measured, {measured}; name that "
        "one's with --image where there is one"
    )


def _service(
    server: Server,
    image: str,
    program: Sequence[str],
    volumes: Sequence[str],
    host: str,
    device: str,
) -> dict[str, Any]:
    arguments = _arguments(server.launch.command)
    inside = ["--host", INSIDE, "--port", str(server.port)]
    service: dict[str, Any] = {
        "image": image,
        "entrypoint": list(program),
        "command": [_literal(word) for word in [*arguments, *inside]],
        "ports": [f"{_address(host)}:{server.port}:{server.port}"],
        "restart": "unless-stopped",
    }
    if server.launch.environment:
        service["environment"] = {
            name: _literal(value) for name, value in server.launch.environment.items()
        }
    if volumes:
        service["volumes"] = list(volumes)
    if device == "cuda":
        nvidia = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [nvidia]}}}
        service["ipc"] = "host"
    elif device in DEVICES:
        service["devices"] = [f"{path}:{path}" for path in DEVICES[device]]
    return service


def _address(host: str) -> str:
    """An address as compose takes it: in numbers, those of IPv6 in brackets.

    Raises:
        EngineError: for a name that has none here.
    """
    try:
        found = {family: at[0] for family, *_, at in socket.getaddrinfo(host, None)}
    except OSError:
        raise EngineError(
            f"--host: a compose file takes addresses, and {host!r} has none here; give "
            "one, such as 127.0.0.1"
        ) from None
    if socket.AF_INET in found:
        return str(found[socket.AF_INET])
    return f"[{found[socket.AF_INET6]}]"


def _health(server: Server, engine: str) -> dict[str, Any]:
    """Asked by curl or by Python: llama.cpp's images have the one, others the other."""
    url = f"http://127.0.0.1:{server.port}{HEALTH}"
    asked = f"import urllib.request as r; r.urlopen({url!r}, timeout=5)"
    by_curl = ["curl", "-sf", "-o", "/dev/null", url]
    by_python = ["python3", "-c", asked]
    return {
        "test": ["CMD", *(by_curl if engine == "llama.cpp" else by_python)],
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


def _paths(word: str) -> list[str]:
    """Files and folders that are here and that an argument names: it alone, behind
    ``=``, in a list or in JSON; of what is no whole path, files alone."""
    for pieces in (
        [word],
        [word.partition("=")[2]],
        re.split(r'[\s=,:"{}\[\]]+', word),
    ):
        found = [
            piece
            for piece in pieces
            if os.path.isfile(piece)
            or (os.path.isabs(piece) and piece != "/" and os.path.exists(piece))
        ]
        if found:
            return found
    return []


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
